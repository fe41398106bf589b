"""What a tenant may use over time: counted in this process, or in Redis for all gateways."""
