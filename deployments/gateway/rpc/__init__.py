"""The gRPC door: `door.py` in Serve's proxy, the rest in the gateway's replica."""
