"""Stores our records as a tensorflow-datasets data set: array_record files of many shards with
random access, without TensorFlow."""
