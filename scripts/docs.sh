#!/usr/bin/env bash
# Makes the generated parts of docs/ anew: words and parameters, then what works with which family.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
"$python" "$repository/scripts/docs/pages.py" && exec "$python" "$repository/scripts/docs/families.py"
