package devices

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/lab"
)

// watch runs Watch in the test's namespace until the test ends. It returns once
// the subscription stands.
func watch(t *testing.T, ns *lab.NS, changed func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	stands, done := make(chan struct{}), make(chan error, 1)
	first := true
	go func() {
		done <- ns.Do(func() error {
			return Watch(ctx, slog.New(slog.DiscardHandler), func() {
				if first {
					first = false
					close(stands)
					return
				}
				changed()
			})
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("watch: %v", err)
		}
	})
	select {
	case <-stands:
	case err := <-done:
		t.Fatalf("watch: %v", err)
	}
}

func TestWatch(t *testing.T) {
	ns := namespace(t)
	calls := make(chan struct{}, 1000)
	watch(t, ns, func() { calls <- struct{}{} })

	eth0 := link(t, "eth0")
	addr4, addr6 := newIfaddr("10.0.2.15/24", nil), newIfaddr("2001:db8::15/64", nil)
	route4 := &netlink.Route{Dst: ipNet("0.0.0.0/0"), Gw: net.IPv4(10, 0, 2, 2)}
	route6 := &netlink.Route{Dst: ipNet("::/0"), Gw: net.ParseIP("2001:db8::2")}
	clsact := &netlink.GenericQdisc{QdiscType: "clsact", QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: eth0.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
	filter := &netlink.BpfFilter{Fd: program(t), DirectAction: true, FilterAttrs: netlink.FilterAttrs{
		LinkIndex: eth0.Attrs().Index, Parent: netlink.HANDLE_MIN_EGRESS, Handle: 1, Priority: 1, Protocol: unix.ETH_P_ALL}}
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}
	for _, step := range []struct {
		what string
		do   func() error
	}{
		{"add IPv4 address", func() error { return netlink.AddrAdd(eth0, addr4) }},
		{"add IPv6 address", func() error { return netlink.AddrAdd(eth0, addr6) }},
		{"add IPv4 route", func() error { return netlink.RouteAdd(route4) }},
		{"add IPv6 route", func() error { return netlink.RouteAdd(route6) }},
		{"change IPv4 route", func() error { route4.Src = net.IPv4(10, 0, 2, 15); return netlink.RouteReplace(route4) }},
		{"delete IPv6 route", func() error { return netlink.RouteDel(route6) }},
		{"delete IPv4 address", func() error { return netlink.AddrDel(eth0, addr4) }},
		{"delete IPv6 address", func() error { return netlink.AddrDel(eth0, addr6) }},
		{"add qdisc", func() error { return netlink.QdiscAdd(clsact) }},
		{"add filter", func() error { return netlink.FilterAdd(filter) }},
		{"delete filter", func() error { return netlink.FilterDel(filter) }},
		{"delete qdisc", func() error { return netlink.QdiscDel(clsact) }},
		{"add link", func() error { return netlink.LinkAdd(bridge) }},
		{"set link up", func() error { return netlink.LinkSetUp(bridge) }},
		{"delete link", func() error { return netlink.LinkDel(bridge) }},
	} {
		quiet(calls)
		start := time.Now()
		if err := step.do(); err != nil {
			t.Fatalf("%s: %v", step.what, err)
		}
		select {
		case <-calls:
			if d := time.Since(start); d > time.Second {
				t.Errorf("%s: seen after %s", step.what, d)
			}
		case <-time.After(5 * time.Second):
			t.Fatalf("%s: not seen", step.what)
		}
	}
}

// program is a tc program that passes everything.
func program(t *testing.T) (fd int) {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "MIT",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()}})
	must(t, err)
	t.Cleanup(func() { p.Close() })
	return p.FD()
}

// quiet waits until nothing of an earlier step is left to be reported (link-local
// addresses and their routes appear on their own).
func quiet(calls chan struct{}) {
	for {
		select {
		case <-calls:
		case <-time.After(2 * settle):
			return
		}
	}
}

func TestWatchCollects(t *testing.T) {
	ns := namespace(t)
	calls := make(chan struct{}, 1000)
	watch(t, ns, func() { calls <- struct{}{} })
	quiet(calls)
	for i := range 200 {
		addAddr(t, "eth0", fmt.Sprintf("10.1.%d.1/24", i), nil)
	}
	quiet(calls)
	addAddr(t, "eth0", "10.2.0.1/24", nil)
	<-calls
	if n := len(calls); n > 3 {
		t.Errorf("%d calls for one change after a burst", n)
	}
}

// While changed runs, nobody receives: the kernel drops messages when the socket
// is full. The change that was lost with them must be noticed all the same.
func TestWatchSurvivesOverflow(t *testing.T) {
	ns := namespace(t)
	eth0 := link(t, "eth0")
	addAddr(t, "eth0", "10.0.2.15/24", nil)
	entered, release := make(chan struct{}, 1000), make(chan struct{})
	watch(t, ns, func() { entered <- struct{}{}; <-release })

	addAddr(t, "eth0", "10.0.3.15/24", nil)
	<-entered // changed is blocked now
	for i := range 1000 {
		r := &netlink.Route{Dst: ipNet(fmt.Sprintf("10.9.%d.%d/32", i/256, i%256)), LinkIndex: eth0.Attrs().Index, Scope: netlink.SCOPE_LINK}
		must(t, netlink.RouteAdd(r))
	}
	close(release)
	await := func(what string) {
		t.Helper()
		select {
		case <-entered:
		case <-time.After(5 * time.Second):
			t.Fatalf("%s: not seen", what)
		}
	}
	await("overflow")
	quiet(entered)
	addAddr(t, "eth0", "10.0.4.15/24", nil)
	await("address after the overflow")
}

func TestWatchEnds(t *testing.T) {
	namespace(t)
	ctx, cancel := context.WithCancel(t.Context())
	if err := Watch(ctx, slog.New(slog.DiscardHandler), cancel); err != nil {
		t.Error(err)
	}
}
