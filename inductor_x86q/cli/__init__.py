"""The command line: `x86q doctor | explain | code | why | tune | bench | coverage`, also as `python -m inductor_x86q`.

Exit codes: 0 done; 1 a layer was missed under --strict, a budget of accuracy cannot be met, or the doctor found what makes
int8 wrong or impossible here;
2 the command line, the model or its inputs cannot be used as given (the message says why).
"""

from inductor_x86q.cli.output import DONE, FAILED, UNUSABLE
from inductor_x86q.cli.parser import main

__all__ = ["DONE", "FAILED", "UNUSABLE", "main"]
