"""All that touches Inductor and Dynamo, and every private interface of torch."""
