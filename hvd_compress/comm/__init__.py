"""Communication: the only imports of Horovod and mpi4py."""
