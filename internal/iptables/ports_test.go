package iptables

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

func TestPortRanges(t *testing.T) {
	pool := func(runs ...[2]int) []uint16 {
		var list []uint16
		for _, r := range runs {
			list = append(list, ports(r[0], r[1])...)
		}
		return list
	}
	for _, c := range []struct {
		ports []uint16
		want  []portRange
	}{
		{nil, nil},
		{pool([2]int{1, 65535}), []portRange{{1, 65535}}},
		{pool([2]int{1024, 29999}, [2]int{32768, 65535}), []portRange{{1024, 29999}, {32768, 65535}}},
		{pool([2]int{1024, 29999}, [2]int{32000, 32001}), []portRange{{1024, 29999}}}, // too few to be worth it
		{pool([2]int{5, 5}), []portRange{{5, 5}}},
		{pool([2]int{1, 10}, [2]int{21, 30}), []portRange{{1, 10}, {21, 30}}}, // nothing else there
		{pool([2]int{100, 199}, [2]int{300, 340}), []portRange{{100, 199}, {300, 340}}},
	} {
		if got := portRanges(c.ports); !slices.Equal(got, c.want) {
			t.Errorf("%d ports: %v, want %v", len(c.ports), got, c.want)
		}
	}
}

// Source ports in the pool are kept, others spread over all runs of it, for every protocol
// with ports.
func TestPortsOnTheWire(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		for _, random := range []bool{false, true} {
			o.RandomFully = random
			w := newWire(t, o)
			w.apply(build(t, func(in *policy.Input) { in.Ports = append(ports(2000, 2999), ports(50000, 50999)...) }))
			for _, proto := range []uint8{packet.TCP, packet.UDP, packet.SCTP} {
				kept, low := 0, 0
				const n = 60
				for i := range n {
					port, to := uint16(10000+i), uint16(81) // another remote: no clash with those that are kept
					if i%2 == 0 {
						to = 80
						port = uint16(2000+i) + uint16(i%4)*24000 // 2000 and so on, or 50000
					}
					got := w.external(proto, port, to)
					if (got < 2000 || got > 2999) && (got < 50000 || got > 50999) {
						t.Fatalf("protocol %d: port %d became %d", proto, port, got)
					}
					switch {
					case got == port:
						kept++
					case got < 3000 && i%2 == 1:
						low++
					}
				}
				if !random && kept != n/2 || random && kept > 3 {
					t.Errorf("protocol %d, random %v: %d of %d ports in the pool were kept", proto, random, kept, n/2)
				}
				if low < 4 || low > n/2-4 {
					t.Errorf("protocol %d: %d of %d others are in the lower run of the pool", proto, low, n/2)
				}
			}
		}
	})
}

// external sends the first packet of a connection and returns its port outside.
func (w *wire) external(proto uint8, port, to uint16) uint16 {
	w.t.Helper()
	p := packet.Packet{Src: netip.MustParseAddr("10.0.1.2"), Dst: netip.MustParseAddr("198.51.100.1"),
		Proto: proto, SrcPort: port, DstPort: to, Flags: packet.SYN, Payload: make([]byte, 20)}
	if proto == packet.SCTP {
		p.Type, p.Payload[0] = packet.SCTPInit, 1
	}
	w.arrive("in0", p)
	left := w.left("eth0")
	if len(left) != 1 {
		w.t.Fatalf("protocol %d, port %d: %d packets left", proto, port, len(left))
	}
	f, _ := lab.ParseIP(left[0])
	if f.Src != netip.MustParseAddr("192.0.2.1") {
		w.t.Fatalf("protocol %d, port %d: left with source %s", proto, port, f.Src)
	}
	return binary.BigEndian.Uint16(f.L4)
}

// A device that gets the address it lacked: at no moment does a packet leave untranslated.
func TestNoGapWhenAnAddressComes(t *testing.T) {
	without := func(in *policy.Input) { in.Devices[0].IPv4 = netip.Addr{} }
	routed := func(in *policy.Input) {
		without(in)
		in.RouteSources = []policy.RouteSource{{Prefix: netip.MustParsePrefix("198.51.100.0/24"), Source: netip.MustParseAddr("192.0.2.9")}}
	}
	second := func(lacks int) func(in *policy.Input) {
		return func(in *policy.Input) {
			in.Devices = append(in.Devices, in.Devices[0])
			in.Devices[1].Name, in.Devices[1].Index = "eth1", 101
			in.Devices[lacks].IPv4 = netip.Addr{}
		}
	}
	for name, c := range map[string][2]func(in *policy.Input){
		"an address":      {without, nil},
		"a route":         {without, routed},
		"a route less":    {routed, nil},
		"the other lacks": {second(0), second(1)},
	} {
		old, wanted := Render(build(t, c[0]), IPv4, RenderOptions{}), Render(build(t, c[1]), IPv4, RenderOptions{})
		states := map[string]tableState{"mangle": stateOf(old.Tables[0]), "nat": stateOf(old.Tables[1])}
		order := steps(wanted, states["mangle"])
		for _, step := range order {
			states[step.Name] = stateOf(step)
			mangle, nat := states["mangle"].chains, states["nat"].chains
			// Devices without a drop must have a translation; what passes by a route likewise.
			for _, dev := range []string{"eth0", "eth1"} {
				if !slices.Contains(nat[entryChain], "-o "+dev+" -g "+sourceChain) {
					continue
				}
				drops := slices.ContainsFunc(mangle[deviceChain], func(r string) bool { return option(fields(r), "-o") == dev })
				translates := slices.ContainsFunc(nat[deviceChain], func(r string) bool { return option(fields(r), "-o") == dev })
				if !drops && !translates {
					t.Errorf("%s: after %s: %s neither drops nor translates", name, step.Name, dev)
				}
			}
			devices := len(nat[deviceChain]) == len(nat[entryChain]) // all translate
			for _, r := range mangle[addressChain] {
				to := option(fields(r), "-d")
				if option(fields(r), "-j") == "RETURN" && !devices && !slices.ContainsFunc(nat[addressChain], func(n string) bool {
					return option(fields(n), "-d") == to && option(fields(n), "-g") != deviceChain
				}) {
					t.Errorf("%s: after %s: %s passes the guard, and nat does not know it", name, step.Name, to)
				}
			}
		}
		last := order[len(order)-1]
		if diff := last.difference(stateOf(last)); diff != "" || wanted.Tables[0].difference(states["mangle"]) != "" || wanted.Tables[1].difference(states["nat"]) != "" {
			t.Errorf("%s: the steps do not end with what is wanted", name)
		}
	}
	// The kernel takes the steps.
	eachBackend(t, func(t *testing.T, o Options) {
		n := tables(t, labtest.NewNS(t), o)
		for _, change := range []func(*policy.Input){without, nil, second(0), second(1), routed, second(1), without, routed, nil} {
			n.apply(build(t, change))
			n.right()
		}
	})
}
