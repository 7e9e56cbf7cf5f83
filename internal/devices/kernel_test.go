package devices

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"reflect"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// namespace puts the test into a network namespace of its own, with eth0 (a veth
// whose other end is peer0) up. The thread is never unlocked, so that the runtime
// throws it away with the test's goroutine.
func namespace(t *testing.T) *lab.NS {
	t.Helper()
	t.Parallel()
	ns := labtest.NewNS(t)
	runtime.LockOSThread()
	must(t, ns.WithFD(func(fd int) error { return netns.Set(netns.NsHandle(fd)) }))
	addVeth(t, "eth0", "peer0")
	setUp(t, "lo", "eth0", "peer0")
	return ns
}

func addVeth(t *testing.T, name, peer string) {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: peer}))
}

func setUp(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		must(t, netlink.LinkSetUp(link(t, name)))
	}
}

func link(t *testing.T, name string) netlink.Link {
	t.Helper()
	l, err := netlink.LinkByName(name)
	must(t, err)
	return l
}

func ipNet(s string) *net.IPNet {
	p := netip.MustParsePrefix(s)
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// newIfaddr is an address that is usable at once, unless change says otherwise.
func newIfaddr(s string, change func(*netlink.Addr)) *netlink.Addr {
	a := &netlink.Addr{IPNet: ipNet(s), Flags: unix.IFA_F_NODAD}
	if a.IP.To4() != nil {
		a.Broadcast = net.IPv4(10, 0, 7, 255).To4() // or else netlink thinks of one
	}
	if change != nil {
		change(a)
	}
	return a
}

func addAddr(t *testing.T, dev, s string, change func(*netlink.Addr)) {
	t.Helper()
	if err := netlink.AddrAdd(link(t, dev), newIfaddr(s, change)); err != nil {
		t.Fatalf("add address %s: %v", s, err)
	}
}

func addRoute(t *testing.T, dst string, change func(*netlink.Route)) {
	t.Helper()
	r := &netlink.Route{Dst: ipNet(dst)}
	change(r)
	if err := netlink.RouteAdd(r); err != nil {
		t.Fatalf("add route %s: %v", dst, err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func snapshot(t *testing.T) Snapshot {
	t.Helper()
	s, err := Read()
	must(t, err)
	return s
}

func TestReadLinks(t *testing.T) {
	namespace(t)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "br0"
	must(t, netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}))
	must(t, netlink.LinkSetMaster(link(t, "peer0"), link(t, "br0")))
	must(t, netlink.LinkAdd(&netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "tun0"}, Mode: netlink.TUNTAP_MODE_TUN}))

	type facts struct {
		Kind, Hardware string
		Ethernet, Up   bool
		Master         int
	}
	want := map[string]facts{
		"lo":    {"device", "loopback", true, true, 0},
		"eth0":  {"veth", "ether", true, true, 0},
		"peer0": {"veth", "ether", true, true, link(t, "br0").Attrs().Index},
		"br0":   {"bridge", "ether", true, false, 0},
		"tun0":  {"tuntap", "none", false, false, 0},
	}
	for _, l := range snapshot(t).Links {
		got := facts{l.Kind, l.Hardware, l.Ethernet(), l.Up(), l.Master}
		if w, ok := want[l.Name]; ok && got != w {
			t.Errorf("%s: got %+v, want %+v", l.Name, got, w)
		}
		delete(want, l.Name)
	}
	if len(want) > 0 {
		t.Errorf("not seen: %v", want)
	}
}

func TestReadAddrs(t *testing.T) {
	namespace(t)
	addAddr(t, "eth0", "10.0.2.15/24", nil)
	addAddr(t, "eth0", "10.0.2.16/24", nil)
	addAddr(t, "eth0", "10.0.3.1/32", func(a *netlink.Addr) { a.Peer = ipNet("10.0.4.2/24") })
	addAddr(t, "eth0", "10.0.5.1/24", func(a *netlink.Addr) { a.ValidLft, a.PreferedLft = 1000, 0 })
	addAddr(t, "eth0", "10.0.6.1/24", func(a *netlink.Addr) { a.Scope = unix.RT_SCOPE_LINK })
	addAddr(t, "eth0", "2001:db8::1/64", nil)
	addAddr(t, "eth0", "2001:db8::2/64", func(a *netlink.Addr) { a.ValidLft, a.PreferedLft = 1000, 0 })

	index := link(t, "eth0").Attrs().Index
	plain := func(s string) Addr {
		p := netip.MustParsePrefix(s)
		return Addr{Index: index, Addr: p.Addr(), Subnet: p.Masked()}
	}
	with := func(a Addr, change func(*Addr)) Addr { change(&a); return a }
	want := []Addr{
		with(plain("10.0.6.1/24"), func(a *Addr) { a.Scope = unix.RT_SCOPE_LINK }), // narrow scopes first
		plain("10.0.2.15/24"),
		with(plain("10.0.3.1/32"), func(a *Addr) { a.Subnet = netip.MustParsePrefix("10.0.4.0/24") }),
		with(plain("10.0.5.1/24"), func(a *Addr) { a.Deprecated = true }),
		with(plain("10.0.2.16/24"), func(a *Addr) { a.Secondary = true }),
		with(plain("2001:db8::2/64"), func(a *Addr) { a.Deprecated = true }), // the newest first
		plain("2001:db8::1/64"),
	}
	for i := range want {
		if want[i].Addr.Is4() {
			want[i].Broadcast = netip.MustParseAddr("10.0.7.255")
		}
	}
	var got []Addr
	for _, a := range snapshot(t).Addrs {
		if a.Index == index && !a.Addr.IsLinkLocalUnicast() {
			got = append(got, a)
		}
	}
	slices.SortStableFunc(got, func(a, b Addr) int { return a.Addr.BitLen() - b.Addr.BitLen() })
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got\n%+v\nwant\n%+v", got, want)
	}
}

// What newAddr makes of flags that a kernel sets only after a while.
func TestAddrFlags(t *testing.T) {
	for _, c := range []struct {
		addr  string
		flags int
		want  Addr
	}{
		{"10.0.0.1/24", unix.IFA_F_SECONDARY, Addr{Secondary: true}},
		{"2001:db8::1/64", unix.IFA_F_TEMPORARY, Addr{Temporary: true}},
		{"2001:db8::1/64", unix.IFA_F_TENTATIVE, Addr{Tentative: true}},
		{"2001:db8::1/64", unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED, Addr{Tentative: true, DADFailed: true}},
		{"2001:db8::1/64", unix.IFA_F_TENTATIVE | unix.IFA_F_OPTIMISTIC, Addr{}},
		{"2001:db8::1/64", unix.IFA_F_DEPRECATED | unix.IFA_F_MANAGETEMPADDR, Addr{Deprecated: true}},
	} {
		p := netip.MustParsePrefix(c.addr)
		c.want.Addr, c.want.Subnet = p.Addr(), p.Masked()
		if got, ok := newAddr(netlink.Addr{IPNet: ipNet(c.addr), Flags: c.flags}); !ok || got != c.want {
			t.Errorf("%s flags %#x: got %+v, want %+v", c.addr, c.flags, got, c.want)
		}
	}
}

func TestReadRoutes(t *testing.T) {
	namespace(t)
	addVeth(t, "eth1", "peer1")
	setUp(t, "eth1", "peer1")
	addAddr(t, "eth0", "10.0.2.15/24", nil)
	addAddr(t, "eth1", "10.0.3.15/24", nil)
	addAddr(t, "eth0", "2001:db8::15/64", nil)
	eth0, eth1 := link(t, "eth0").Attrs().Index, link(t, "eth1").Attrs().Index
	via4, via4b, via6 := net.IPv4(10, 0, 2, 2), net.IPv4(10, 0, 3, 2), net.ParseIP("2001:db8::2")

	addRoute(t, "0.0.0.0/0", func(r *netlink.Route) { r.Gw, r.Src, r.Priority = via4, net.IPv4(10, 0, 3, 15), 100 })
	addRoute(t, "0.0.0.0/0", func(r *netlink.Route) { r.Gw, r.Table = via4b, 300 })
	addRoute(t, "198.51.100.0/24", func(r *netlink.Route) {
		r.MultiPath = []*netlink.NexthopInfo{{LinkIndex: eth0, Gw: via4}, {LinkIndex: eth1, Gw: via4b}}
	})
	addRoute(t, "203.0.113.0/24", func(r *netlink.Route) { r.Type = unix.RTN_BLACKHOLE })
	addRoute(t, "192.0.2.7/32", func(r *netlink.Route) {
		r.Type, r.LinkIndex, r.Table, r.Scope = unix.RTN_LOCAL, 1, unix.RT_TABLE_LOCAL, netlink.SCOPE_HOST
	})
	addRoute(t, "::/0", func(r *netlink.Route) { r.Gw, r.Src = via6, net.ParseIP("2001:db8::15") })

	a, p := netip.MustParseAddr, netip.MustParsePrefix
	hop0, hop1 := Hop{eth0, a("10.0.2.2")}, Hop{eth1, a("10.0.3.2")}
	want := []Route{
		{Dst: p("0.0.0.0/0"), Table: 254, Metric: 100, Source: a("10.0.3.15"), Hops: []Hop{hop0}},
		{Dst: p("0.0.0.0/0"), Table: 300, Hops: []Hop{hop1}},
		{Dst: p("198.51.100.0/24"), Table: 254, Hops: []Hop{hop0, hop1}},
		{Dst: p("10.0.2.0/24"), Table: 254, Source: a("10.0.2.15"), Hops: []Hop{{Index: eth0}}},
		{Dst: p("10.0.2.15/32"), Type: Local, Table: 255, Source: a("10.0.2.15"), Hops: []Hop{{Index: eth0}}},
		{Dst: p("192.0.2.7/32"), Type: Local, Table: 255, Hops: []Hop{{Index: 1}}},
		{Dst: p("::/0"), Table: 254, Metric: 1024, Source: a("2001:db8::15"), Hops: []Hop{{eth0, a("2001:db8::2")}}},
	}
	got := snapshot(t).Routes
	for _, w := range want {
		if !slices.ContainsFunc(got, func(r Route) bool { return reflect.DeepEqual(r, w) }) {
			t.Errorf("no route %+v", w)
		}
	}
	for _, r := range got {
		if r.Dst == p("203.0.113.0/24") {
			t.Errorf("blackhole route: %+v", r)
		}
	}
}

// A node as the kernel describes it, from configuration to selection.
func TestReadAndSelect(t *testing.T) {
	namespace(t)
	addAddr(t, "eth0", "10.0.9.15/24", nil)
	addAddr(t, "eth0", "10.0.2.15/24", nil)
	addAddr(t, "eth0", "2001:db8::15/64", nil)
	addRoute(t, "0.0.0.0/0", func(r *netlink.Route) { r.Gw = net.IPv4(10, 0, 2, 2) })
	sel := Select(snapshot(t), Options{})
	if len(sel.Devices) != 1 {
		t.Fatalf("devices: %+v", sel.Devices)
	}
	d := sel.Devices[0]
	if d.Name != "eth0" || !d.Ethernet || !d.Up || d.IPv4.String() != "10.0.2.15" || d.IPv6.String() != "2001:db8::15" {
		t.Errorf("device: %+v", d)
	}
	if !sel.DefaultRoute4 || sel.DefaultRoute6 {
		t.Errorf("default routes: IPv4 %t, IPv6 %t", sel.DefaultRoute4, sel.DefaultRoute6)
	}
	if got, want := fmt.Sprint(d.Broadcasts), "[10.0.2.255 10.0.7.255 10.0.9.255]"; got != want {
		t.Errorf("broadcasts: got %s, want %s", got, want)
	}
}

// Links come and go during the dumps, as on a node that starts pods. Every
// snapshot must fit together, and Read must not give up.
func TestReadDuringChanges(t *testing.T) {
	ns := namespace(t)
	addAddr(t, "eth0", "10.0.2.15/24", nil)
	stop, stopped := make(chan struct{}), make(chan error, 1)
	go func() {
		stopped <- ns.Do(func() error {
			for {
				select {
				case <-stop:
					return nil
				default:
				}
				l := netlink.NewVeth(netlink.LinkAttrs{Name: "pod0"})
				l.PeerName = "pod1"
				err := errors.Join(netlink.LinkAdd(l), netlink.LinkSetUp(l),
					netlink.AddrAdd(l, newIfaddr("10.0.3.15/24", nil)), netlink.LinkDel(l))
				if err != nil {
					return err
				}
			}
		})
	}()
	for end := time.Now().Add(time.Second); time.Now().Before(end); {
		s, err := Read()
		if err != nil {
			t.Error(err)
			break
		}
		if len(Select(s, Options{Patterns: []string{"eth0"}}).Devices) != 1 {
			t.Errorf("eth0 is not in %+v", s)
		}
	}
	close(stop)
	must(t, <-stopped)
}

func TestReadTunnelPorts(t *testing.T) {
	namespace(t)
	for i, port := range []int{8472, 4789, 8472} {
		must(t, netlink.LinkAdd(&netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: fmt.Sprintf("vx%d", i)}, VxlanId: i, Port: port}))
	}
	want := []uint16{4789, 8472}
	err := netlink.LinkAdd(&netlink.Geneve{LinkAttrs: netlink.LinkAttrs{Name: "gnv0"}, ID: 7, Remote: net.IPv4(10, 0, 0, 9), Dport: 6082})
	if !errors.Is(err, unix.EOPNOTSUPP) { // a kernel without Geneve
		must(t, err)
		want = []uint16{4789, 6082, 8472}
	}
	if got := snapshot(t).TunnelPorts(); !slices.Equal(got, want) {
		t.Errorf("tunnel ports %v, want %v", got, want)
	}
}
