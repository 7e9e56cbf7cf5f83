package devices

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/advice"
	"bauta.dev/bauta/internal/lab/labtest"
)

// A forwarded packet is routed as the kernel does it: by its source and the device that it comes
// from, too. One for the node goes by the loopback.
func TestEgress(t *testing.T) {
	namespace(t)
	addVeth(t, "eth1", "peer1")
	setUp(t, "eth1", "peer1")
	eth0, eth1, lo := link(t, "eth0"), link(t, "eth1"), link(t, "lo")
	must(t, netlink.AddrAdd(eth0, &netlink.Addr{IPNet: ipNet("192.0.2.1/24")}))
	must(t, netlink.AddrAdd(eth0, &netlink.Addr{IPNet: ipNet("2001:db8::1/64"), Flags: unix.IFA_F_NODAD}))
	must(t, netlink.AddrAdd(eth1, &netlink.Addr{IPNet: ipNet("10.0.1.1/24")}))
	must(t, netlink.RouteAdd(&netlink.Route{Dst: ipNet("198.51.100.0/24"), Gw: ipNet("192.0.2.9/32").IP}))
	must(t, netlink.RouteAdd(&netlink.Route{Dst: ipNet("203.0.113.0/24"), Type: unix.RTN_UNREACHABLE}))
	must(t, netlink.RouteAdd(&netlink.Route{Dst: ipNet("224.0.0.0/4"), LinkIndex: eth0.Attrs().Index}))
	for _, c := range []struct {
		src, dst string
		want     netlink.Link
	}{
		{"10.0.1.2", "192.0.2.7", eth0},
		{"10.0.1.2", "198.51.100.3", eth0},
		{"10.0.1.2", "192.0.2.1", lo},
		{"10.0.1.2", "10.0.1.1", lo},
		{"10.0.1.2", "10.0.1.3", eth1},
		{"10.0.1.2", "192.0.2.255", eth0},
		{"10.0.1.2", "224.0.0.1", eth0}, // all hosts, the node too
		{"192.0.2.1", "198.51.100.3", eth0},
		{"172.31.9.9", "198.51.100.3", eth0}, // from nowhere
		{"fd00::2", "2001:db8::7", eth0},
		{"fd00::2", "2001:db8::1", lo},
	} {
		// The kernel makes the routes of an IPv6 address some time after the address.
		labtest.Eventually(t, 5*time.Second, func() error {
			got, err := Egress(netip.MustParseAddr(c.src), netip.MustParseAddr(c.dst))
			if err == nil && got != c.want.Attrs().Index {
				err = fmt.Errorf("device %d, want %s", got, c.want.Attrs().Name)
			}
			if err != nil {
				return fmt.Errorf("%s to %s: %w", c.src, c.dst, err)
			}
			return nil
		})
	}
	for _, dst := range []string{"203.0.113.1", "10.9.9.9", "2001:db8:9::1"} {
		src := netip.MustParseAddr("10.0.1.2")
		if strings.Contains(dst, ":") {
			src = netip.MustParseAddr("fd00::2")
		}
		if got, err := Egress(src, netip.MustParseAddr(dst)); err == nil || len(advice.Of(err)) == 0 {
			t.Errorf("no route to %s: device %d, %v, want an error with a hint", dst, got, err)
		}
	}
}

// A rule sends what comes from the pods' device by another way than what the node sends.
func TestEgressByRule(t *testing.T) {
	ns := namespace(t)
	addVeth(t, "eth1", "peer1")
	addVeth(t, "eth2", "peer2")
	setUp(t, "eth1", "peer1", "eth2", "peer2")
	eth0, eth1, pods := link(t, "eth0"), link(t, "eth1"), link(t, "eth2")
	must(t, netlink.AddrAdd(eth0, &netlink.Addr{IPNet: ipNet("192.0.2.1/24")}))
	must(t, netlink.AddrAdd(eth1, &netlink.Addr{IPNet: ipNet("203.0.113.1/24")}))
	must(t, netlink.AddrAdd(pods, &netlink.Addr{IPNet: ipNet("10.0.1.1/24")}))
	must(t, ns.Sysctl("net.ipv4.ip_forward", "1"))
	must(t, netlink.RouteAdd(&netlink.Route{Dst: ipNet("198.51.100.0/24"), Gw: ipNet("192.0.2.9/32").IP}))
	must(t, netlink.RouteAdd(&netlink.Route{Dst: ipNet("198.51.100.0/24"), Gw: ipNet("203.0.113.9/32").IP, Table: 100}))
	rule := netlink.NewRule()
	rule.Src, rule.Table, rule.Priority = ipNet("10.0.1.0/24"), 100, 1000
	must(t, netlink.RuleAdd(rule))
	dst := netip.MustParseAddr("198.51.100.3")
	for src, want := range map[string]netlink.Link{"10.0.1.2": eth1, "192.0.2.1": eth0} {
		if got, err := Egress(netip.MustParseAddr(src), dst); err != nil || got != want.Attrs().Index {
			t.Errorf("from %s: device %d, %v, want %s", src, got, err, want.Attrs().Name)
		}
	}
}
