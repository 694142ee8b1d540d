"""constraints.txt: an exact version, within its range, of each package that is required."""
import os
import re

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
import pytest

from conftest import ROOT

FILES = [name for name in sorted(os.listdir(ROOT)) if re.fullmatch(r'requirements.*\.txt', name)]


def requirements(name):
    """Returns the requirements in a file's own lines."""
    with open(os.path.join(ROOT, name), encoding='utf-8') as f:
        lines = [line.partition('#')[0].strip() for line in f]
    return [Requirement(line) for line in lines if line and not line.startswith('-')]


def faults(name, pins):
    """Returns what is wrong with the pins for a file's requirements, a list of lines."""
    found = []
    for required in requirements(name):
        version = pins.get(canonicalize_name(required.name))
        if version is None:
            found.append(f'{required.name} has no exact version')
        elif not required.specifier.contains(version):
            found.append(f'{required.name} {version} is not in {required.specifier}')
    return found


@pytest.fixture(scope='module')
def pins():
    return {canonicalize_name(pin.name): str(pin.specifier)[2:]
            for pin in requirements('constraints.txt')}


def test_all_are_exact_and_named_once(pins):
    lines = requirements('constraints.txt')
    assert all(re.fullmatch(r'==[\w.]+', str(pin.specifier)) for pin in lines)
    assert len(pins) == len(lines) > 50  # with what the required ones require


@pytest.mark.parametrize('name', FILES)
def test_each_requirement_has_an_exact_version_within_its_range(pins, name):
    least = 1 if name == 'requirements-cluster.txt' else 3
    assert len(requirements(name)) >= least and faults(name, pins) == []


def test_a_missing_or_foreign_version_would_be_found(pins):
    numpy = {**pins, 'numpy': '1.0'}
    assert faults('requirements.txt', numpy) == ['numpy 1.0 is not in <3,>=1.26']
    del numpy['numpy']
    assert faults('requirements.txt', numpy) == ['numpy has no exact version']
