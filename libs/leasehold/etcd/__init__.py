"""etcd: the port, an adapter for real servers, leader election, and an in-memory twin."""
