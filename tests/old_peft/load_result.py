"""Load a folder with the PEFT at hand and print what the network gives: `python load_result.py FOLDER`.

A warning that speaks of keys or of unexpected arguments ends it with an error.
"""

import json
import sys
import warnings

import peft
from net import base, inputs

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = peft.PeftModel.from_pretrained(base(), sys.argv[1]).eval()
    output = model(inputs()).tolist()
said = [str(warning.message) for warning in caught]
odd = [text for text in said if "key" in text.lower() or "unexpected" in text.lower()]
assert not odd, odd
print(json.dumps({"version": peft.__version__, "output": output}))
