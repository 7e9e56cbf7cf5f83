package devices

import (
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestLeave(t *testing.T) {
	namespace(t)
	eth0, lo := link(t, "eth0"), link(t, "lo")
	must(t, netlink.AddrAdd(eth0, &netlink.Addr{IPNet: ipNet("192.0.2.1/24")}))
	must(t, netlink.AddrAdd(eth0, &netlink.Addr{IPNet: ipNet("2001:db8::1/64"), Flags: unix.IFA_F_NODAD}))
	must(t, netlink.RouteAdd(&netlink.Route{Dst: ipNet("198.51.100.0/24"), Gw: ipNet("192.0.2.9/32").IP}))
	must(t, netlink.RouteAdd(&netlink.Route{Dst: ipNet("203.0.113.0/24"), Type: unix.RTN_UNREACHABLE}))
	want := map[netip.Addr]int{
		netip.MustParseAddr("192.0.2.7"):    eth0.Attrs().Index,
		netip.MustParseAddr("198.51.100.3"): eth0.Attrs().Index,
		netip.MustParseAddr("2001:db8::7"):  eth0.Attrs().Index,
		netip.MustParseAddr("192.0.2.1"):    lo.Attrs().Index,
	}
	all := []netip.Addr{netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("10.9.9.9"), netip.MustParseAddr("2001:db8:9::1")}
	for a := range want {
		all = append(all, a)
	}
	got, err := Leave(all)
	must(t, err)
	if len(got) != len(want) {
		t.Errorf("%v, want %v", got, want)
	}
	for a, index := range want {
		if got[a] != index {
			t.Errorf("%s leaves by %d, want %d", a, got[a], index)
		}
	}
}
