package nodes

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"bauta.dev/bauta/internal/nodes/nodestest"
)

// converted is a Node as we decode it.
func converted(t *testing.T, n *corev1.Node) *node {
	t.Helper()
	data, err := n.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	out := &node{}
	if err := out.Unmarshal(data); err != nil {
		t.Fatal(err)
	}
	return out
}

func known(t *testing.T, list ...*corev1.Node) *state {
	t.Helper()
	s := newState("a")
	s.replace(converteds(t, list...))
	return s
}

func converteds(t *testing.T, list ...*corev1.Node) map[string]*node {
	t.Helper()
	m := make(map[string]*node)
	for _, n := range list {
		m[n.Name] = converted(t, n)
	}
	return m
}

func TestAddresses(t *testing.T) {
	for _, c := range []struct{ address, want string }{
		{"InternalIP=192.0.2.9", "address 192.0.2.9 b InternalIP node b"},
		{"ExternalIP=2001:db8::9", "address 2001:db8::9 b ExternalIP node b"},
		{"Hostname=192.0.2.9", "address 192.0.2.9 b Hostname node b"},
		{"Hostname=b.example", ""},
		{"Hostname=", ""},
		{"InternalDNS=192.0.2.9", ""},
		{"ExternalDNS=b.example", ""},
		{"Other=192.0.2.9", ""},
		{"InternalIP=fe80::1%eth0", `node b: InternalIP "fe80::1%eth0": has a zone`},
		{"InternalIP=::ffff:192.0.2.9", `node b: InternalIP "::ffff:192.0.2.9": an IPv4-mapped IPv6 address`},
		{"Hostname=::ffff:192.0.2.9", `node b: Hostname "::ffff:192.0.2.9": an IPv4-mapped IPv6 address`},
		{"InternalIP=0.0.0.0", `node b: InternalIP "0.0.0.0": not the address of a host`},
		{"InternalIP=::", `node b: InternalIP "::": not the address of a host`},
		{"ExternalIP=224.0.0.1", `node b: ExternalIP "224.0.0.1": not the address of a host`},
		{"ExternalIP=ff02::1", `node b: ExternalIP "ff02::1": not the address of a host`},
		{"InternalIP=node-b", `node b: InternalIP "node-b": not an IP address`},
		{"InternalIP=192.0.2.09", `node b: InternalIP "192.0.2.09": not an IP address`},
		{"InternalIP=192.0.2.9/24", `node b: InternalIP "192.0.2.9/24": not an IP address`},
		{"InternalIP=", `node b: InternalIP "": not an IP address`},
	} {
		s := known(t, nodeA, nodestest.Node("b", "", c.address))
		if got := strings.TrimSpace(strings.TrimPrefix(text(s.snapshot()), ownText)); got != c.want {
			t.Errorf("%s: %s, want %s", c.address, got, c.want)
		}
	}
}

func TestPodRanges(t *testing.T) {
	for _, c := range []struct{ ranges, want string }{
		{"10.0.2.0/24,fd00:2::/64", "pods 10.0.2.0/24 node b\npods fd00:2::/64 node b"},
		{"10.0.2.7/24", "pods 10.0.2.0/24 node b"},
		{"10.0.2.0/24,10.0.2.0/24", "pods 10.0.2.0/24 node b"},
		{"10.0.2.0/24,10.0.3.0", "pods 10.0.2.0/24 node b\nnode b: podCIDR \"10.0.3.0\": not a CIDR"},
		{"0.0.0.0/0", `node b: podCIDR "0.0.0.0/0": holds every address`},
		{"::/0", `node b: podCIDR "::/0": holds every address`},
		{"::ffff:10.0.0.0/120", `node b: podCIDR "::ffff:10.0.0.0/120": an IPv4-mapped IPv6 prefix`},
		{"224.0.0.0/24", `node b: podCIDR "224.0.0.0/24": not a range of hosts`},
		{"10.0.1.0/24", ""}, // of this node
	} {
		s := known(t, nodeA, nodestest.Node("b", c.ranges))
		if got := strings.TrimSpace(strings.TrimPrefix(text(s.snapshot()), ownText)); got != c.want {
			t.Errorf("%s: %s, want %s", c.ranges, got, c.want)
		}
	}
}

func TestOwnNode(t *testing.T) {
	s := known(t, nodeB)
	check := func(what, want string) {
		t.Helper()
		if got := text(s.snapshot()); got != strings.TrimSpace(want) {
			t.Errorf("%s:\n%s\nwant:\n%s", what, got, want)
		}
	}
	check("without", textB+"\n"+addrsB+"\nnode a: there is no Node object of this name (k8s-node-name)")
	s.put(converted(t, nodestest.Node("a", "", "InternalIP=192.0.2.1")))
	check("without ranges", textB+"\n"+addrsB+"\nnode a: its Node object has no podCIDRs")
	s.put(converted(t, nodeA))
	check("well", onlyB)
	s.put(converted(t, nodestest.Node("a", "", "InternalIP=192.0.2.1")))
	check("ranges taken away", onlyB+"\nnode a: its Node object has no podCIDRs, the last pod ranges stay in force")
	s.remove("a")
	check("deleted", onlyB+"\nnode a: its Node object was deleted, the last pod ranges stay in force")
	s.replace(converteds(t, nodeB))
	check("still deleted", onlyB+"\nnode a: its Node object was deleted, the last pod ranges stay in force")
	s.put(converted(t, nodestest.Node("a", "10.0.7.0/24", "InternalIP=192.0.2.1")))
	check("made again", "own 10.0.7.0/24\n"+textB+"\n"+addrsB)
}

// This node was in the cluster under another name: the former object has its address and
// its range for some time yet.
func TestRenamedNode(t *testing.T) {
	s := known(t, nodeA, nodeB, nodestest.Node("former", "10.0.1.0/24,fd00:1::/64", "InternalIP=192.0.2.1", "ExternalIP=203.0.113.1"))
	if got, want := text(s.snapshot()), onlyB+"\naddress 203.0.113.1 former ExternalIP node former"; got != want {
		t.Errorf("%s\nwant:\n%s", got, want)
	}
}

// Of two nodes with one address the one that stays keeps it.
func TestSharedAddress(t *testing.T) {
	s := known(t, nodeA, nodeB, nodestest.Node("c", "", "InternalIP=192.0.2.2"))
	if got, want := text(s.snapshot()), onlyB+"\naddress 192.0.2.2 c InternalIP node c"; got != want {
		t.Errorf("%s\nwant:\n%s", got, want)
	}
	s.remove("b")
	if got, want := text(s.snapshot()), ownText+"\naddress 192.0.2.2 c InternalIP node c"; got != want {
		t.Errorf("%s\nwant:\n%s", got, want)
	}
}

func TestRejectedAreFew(t *testing.T) {
	list := []*corev1.Node{nodeA}
	for i := range 30 {
		list = append(list, nodestest.Node(fmt.Sprintf("n%02d", i), "x"))
	}
	got := known(t, list...).snapshot().Rejected
	if len(got) != maxRejected+1 || got[maxRejected] != "and 20 more values of Node objects that can't be meant" {
		t.Errorf("%q", got)
	}
}

// A snapshot is not changed by what follows.
func TestSnapshotStays(t *testing.T) {
	s := known(t, nodeA, nodeB, nodeC)
	before := s.snapshot()
	want := text(before)
	s.remove("b")
	s.put(converted(t, nodestest.Node("c", "10.9.9.0/24")))
	s.snapshot()
	if got := text(before); got != want || want != bAndC {
		t.Errorf("%s\nwant:\n%s", got, want)
	}
}
