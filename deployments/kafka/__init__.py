"""Takes requests in from Kafka and tells it how executions go on."""
