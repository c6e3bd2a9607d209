"""The limits on files from outside, all in one place.

Artifacts, logs, manifests, samples and images may come from anyone. Each is read only up to these limits, so
that no file can cost more memory or time than the machine has. They are far above what real runs need.
"""

# Artifacts (rankings and steerings)
ARTIFACT_JSON_BYTES = 128 << 20  # ranking.json, steering.json: mostly image hashes, about 70 bytes each
ARTIFACT_TENSOR_BYTES = 2 << 30  # ranking.safetensors, steering.safetensors
LAYERS, HEADS = 4096, 65_536  # of one model; heads per layer
WIDTH = 1 << 26  # features per layer: hidden size, FFN neurons, vocabulary
EXAMPLES = 10_000_000  # in one set of examples
EXAMPLE_SETS = 10_000  # in one provenance
NAME = 4096  # characters of a name, path, model id or hash
INTEGER = 1 << 62  # of offsets, document ids and seeds

# JSON in general
JSON_DEPTH = 32  # lists and mappings inside each other
JSON_INTEGER_DIGITS = 4000  # Python itself refuses 4,300

# Logs of lmms-eval
RESULTS_BYTES = 256 << 20  # one *_results.json
MANIFEST_BYTES = 1 << 30  # one hones_manifest_*.json: two hashes per example
SAMPLE_LINE_BYTES = 256 << 20  # one line of *_samples_*.jsonl, which may hold whole images
SAMPLES_BYTES = 64 << 30  # one *_samples_*.jsonl, which is read line by line
TASKS, METRICS = 2000, 1000  # in one results file; entries per task, of which each metric takes three
ERRORS = 10_000  # listed in one manifest

# Images that a page shows
IMAGE_BYTES = 64 << 20  # one image file, or one data URI
IMAGE_PIXELS = 64_000_000  # width times height

# Charts
CHART_HEADS = 40_000  # cells of a chart of head scales; a larger one is not drawn
CHART_LAYERS = 4096  # bars of a chart of neurons

LARGEST_SCALE = 1e4
"""Largest absolute scale of a steering at its strength. Products beyond this overflow in float16."""
