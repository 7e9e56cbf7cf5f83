// Package lab builds small networks out of network namespaces and veth pairs,
// and sends real traffic through them. The demo and the tests use the same one.
//
// Everything is made by netlink and sockets, never by running ip(8). Nothing
// outside the namespaces that the package creates is touched: veth pairs are
// born in their namespaces, so no name can clash with one of the host, and any
// number of topologies can exist at the same time.
//
// The standard topology, built by [Node]:
//
//	pod 0                     node                                  world
//	eth0 10.0.1.2  ───── pod0 10.0.1.1                              eth0 192.0.2.2
//	     fd00:1::2            fd00:1::1    eth0 192.0.2.1    ─────       2001:db8:2::2
//	pod 1                                       2001:db8:2::1       lo   198.51.100.10, 10.99.0.1
//	eth0 10.0.1.3  ───── pod1                                            2001:db8:99::1
//	     fd00:1::3            (same)       eth1 203.0.113.1  ─────  world 2 (Options.SecondUplink)
//	                                            2001:db8:3::1       eth0 203.0.113.2, 2001:db8:3::2
//
//	Options.Router puts a hop with a small MTU in between:
//	    node eth0 192.0.2.1 ── 192.0.2.254 router 198.18.0.1 ──(MTU 1280)── 198.18.0.2 world
//	              2001:db8:2::1 ─ ::fe             2001:db8:18::1              2001:db8:18::2
//
//	Options.RemoteNode puts a bridge (namespace "switch") and another node in between:
//	    node 192.0.2.1 ── switch ── 192.0.2.2 world (or router)
//	                         └───── 192.0.2.3 remote node, pods 10.0.2.2 and fd00:2::2 on its lo,
//	                                2001:db8:2::3           external address 198.51.100.77
//
// Invariants:
//
//   - The world has no route to a pod address, so an answer to a packet that left
//     untranslated is never sent: a leak is a time-out. Options.WorldKnowsPods adds
//     that route only for what the world sends from its excluded addresses (those on lo).
//   - Addresses are usable at once (no duplicate address detection) and links are
//     operational when the function that made them returns.
//   - A socket belongs to the namespace it was created in for all its life, so what
//     Dial and Listen functions return may be used from any goroutine.
//   - What a Close method removes is gone however often it is called, and it takes
//     no context, so it works after a cancellation.
//   - A process started by [NS.Start] shares the mount namespace of its parent:
//     /sys/class/net there shows the devices of the host, not those of the namespace.
package lab
