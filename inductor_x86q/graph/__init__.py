"""Reading and writing the graph: q/dq nodes, weights, calls, who moves and who aliases what."""
