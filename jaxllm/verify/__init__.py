"""`jaxllm verify`: whether this machine and these settings lose nothing and get nothing silently wrong."""
