"""Start-up of the processes of a laptop training: leaves out two imports that none of them needs.

`rfc3987_syntax` is pulled in by jsonschema's format checker (Ray) and parses a grammar for 2 to 3 s; `sklearn` is
pulled in by transformers for 0.7 s. A training starts about fifteen Python processes on two cores.
"""

import sys

for _name in ("rfc3987_syntax", "sklearn"):
    sys.modules[_name] = None  # type: ignore[assignment]
