"""What torch asks of an optimizer: the checks of its own generic suite, with this class in place of torch's.

torch's wheel has the descriptions (``OptimizerInfo``), not the tests (``TestOptimRenewed``): these ask the same, under
the same names. What is left out:

* ``foreach``, ``fused``, ``capturable``, ``differentiable``, ``maximize`` and everything that compares them: there are
  no such arguments, each step is computed in one way.
* complex and sparse: refused (``test_complex_and_sparse_are_refused``).
* ``test_can_load_older_state_dict``: torch's class had other arguments once; here ``state_version`` decides
  (``test_checkpoints.py``).
* ``test_forloop_goes_right_direction_multigpu``, ``test_state_dict_with_cuda_params`` and the others of several
  devices: the suite runs without an accelerator.
"""
