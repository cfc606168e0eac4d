"""python -m spry_app.cli"""

from spry_app.cli import main

main()
