CALLS = []


def init_distributed_environment(rank, world_size):
    CALLS.append(("init_distributed_environment", rank, world_size))


def initialize_model_parallel(sequence_parallel_degree, ring_degree, ulysses_degree):
    assert CALLS
    CALLS.append(("initialize_model_parallel", sequence_parallel_degree, ring_degree, ulysses_degree))
