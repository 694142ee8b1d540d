"""Imports TensorFlow without the notices of its start; TF_CPP_MIN_LOG_LEVEL=0 shows them.

TensorFlow's libraries write them to the process's standard error, past Python, before anything can
be set. So that is a file for as long as the import takes. What is none of the known notices is
written out afterwards: an error still comes through.
"""
import contextlib
import os
import re
import sys
import tempfile

import running  # noqa: F401  sets TF_CPP_MIN_LOG_LEVEL unless it is set

NOTICES = re.compile(r'''
    WARNING:\ All\ log\ messages\ before\ absl::InitializeLog
    | I\d{4}\ | \d{4}-\d\d-\d\d\ .*:\ I\                      # information
    | .*\b(cudart_stub|cuda_platform|cuda_executor|cuda_diagnostics|computation_placer|
           cuda_fft|cuda_dnn|cuda_blas|port|cpu_feature_guard)\.cc:
    | To\ enable\ the\ following\ instructions
    | \s*$''', re.VERBOSE)


@contextlib.contextmanager
def without_notices():
    """Leaves the notices of TensorFlow's start out of what the block writes to standard error."""
    if os.environ['TF_CPP_MIN_LOG_LEVEL'] == '0':
        yield
        return
    sys.stderr.flush()
    with tempfile.TemporaryFile() as captured:
        kept = os.dup(2)
        os.dup2(captured.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            captured.seek(0)
            for line in captured:
                if not NOTICES.match(line.decode(errors='replace')):
                    os.write(2, line)


with without_notices():
    import tensorflow as tf
    tf.config.list_physical_devices()  # looks for a GPU, and says so where there is none
# Each evaluation builds the graphs of its own inference and attack, on purpose
tf.get_logger().addFilter(lambda record: 'triggered tf.function retracing' not in str(record.msg))
