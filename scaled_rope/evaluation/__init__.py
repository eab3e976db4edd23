from scaled_rope.moved import attributes_of

__getattr__ = attributes_of("evaluation")
