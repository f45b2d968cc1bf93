"""Federate any torch module in a Flower app of one's own.

app = Client(Net, loss, data).add_to(ClientApp())                # client_app.py

@app.main()                                                      # server_app.py
def main(grid, context):
    result = Strategy(Net, loss, held_out).start(grid, context)
"""

from zofed.federated.own_app import Client, Result, Strategy, simulate

__all__ = ["Client", "Result", "Strategy", "simulate"]
