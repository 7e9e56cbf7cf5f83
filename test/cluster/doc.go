// Package cluster runs a real Kubernetes on one machine, for tests: etcd, API
// server, controllers and scheduler in a network namespace, and nodes that are
// namespaces of every kind with containerd, kubelet and kube-proxy in them.
//
//	           fabric: bridge, gateway, "the outside"
//	           br0 192.0.2.1, 2001:db8:2::1
//	           lo  192.175.48.10, 2001:db8:99::10    the world
//	               198.51.100.20, 2001:db8:99::20    the world that knows pods
//	      ┌──────────────┬─────────────────┬─────────────────┐
//	control plane      node1             node2              ...
//	192.0.2.10       192.0.2.11        192.0.2.12
//	etcd, API ...    containerd,       the same
//	                 kubelet, proxy
//	                 pods 10.244.N.0/24, fd00:244:0:N::/64
//
// Nodes have routes to each other's pods, as a cloud network has them. The outside
// has none, but from its second addresses: what leaves untranslated is never
// answered, and a capture remembers it.
//
// Invariants:
//
//   - Nothing of the machine changes: kernel settings that the kubelet would set are
//     files of the node, /proc/sys is read only there but for the node's own
//     network, and the machine's file system is read only but for the cluster's
//     directory. Machine compares before and after.
//   - Namespaces have no names, so any number of clusters can run at a time.
//   - Processes end with the one that started the cluster, however it ends.
//   - Close is complete after a start that stopped half-way, and may be called twice.
package cluster
