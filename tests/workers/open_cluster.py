"""What is said of a cluster that asks for no token, and what is done when it is allowed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
import pieces

from clusters import cluster
from penjing.errors import InputError
from penjing.workers import Where, crew, in_order

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with cluster(1) as one:
        try:
            with crew(Where(ray=one.address), folder):
                print("joined")
        except InputError as error:
            print(error)
        with crew(Where(ray=one.address, insecure=True), folder) as hands:
            hands.start(pieces.Begin(folder))
            print(list(in_order(hands, [(i, "plain") for i in range(3)])))
