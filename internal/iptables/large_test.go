package iptables

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

// prefixes are n different ones that hold no address of the tests.
func prefixes(n int) []policy.Rule {
	list := make([]policy.Rule, n)
	for i := range list {
		a := binary.BigEndian.AppendUint32(nil, 20<<24|uint32(i)<<6)
		addr, _ := netip.AddrFromSlice(a)
		list[i] = policy.Rule{Prefix: netip.PrefixFrom(addr, 26+i%2), Origin: "test"}
	}
	return list
}

// However long a list is, a packet passes the same rules.
func TestRulesDontGrowWithLists(t *testing.T) {
	count := func(n int) (rules int) {
		rs := Render(build(t, func(in *policy.Input) { in.NonMasq = prefixes(n) }), IPv4, RenderOptions{})
		for _, table := range rs.Tables {
			for _, c := range table.Chains {
				rules += len(c.Rules)
			}
		}
		return rules
	}
	if few, many := count(10), count(policy.MaxPrefixes); few != many {
		t.Errorf("%d rules for 10 prefixes, %d for 65536", few, many)
	}
}

func took(f func()) time.Duration {
	start := time.Now()
	f()
	return time.Since(start).Round(time.Millisecond)
}

// A list of the largest size is there in less than a second, and in one moment.
func TestLargeList(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		n := tables(t, labtest.NewNS(t), o)
		few := build(t, func(in *policy.Input) { in.NonMasq = prefixes(10) })
		p := build(t, func(in *policy.Input) { in.NonMasq = prefixes(policy.MaxPrefixes) })
		first, limit := time.Hour, labtest.Patience(time.Second)
		for i := 0; i < 5 && first > limit; i++ { // the machine may be busy
			n.apply(few)
			first = took(func() { n.apply(p) })
		}
		again := took(func() { n.apply(p) })
		check := took(n.right)
		t.Logf("65536 prefixes: apply %s, apply again %s, check %s", first, again, check)
		if first > limit {
			t.Errorf("apply took %s", first)
		}
		if out := n.run("ipset", "list", "-t", "bauta-nonmasq-4"); !strings.Contains(out, "Number of entries: 65536") {
			t.Errorf("%s", out)
		}
		// All but one move to the other list: for a moment both hold all of them.
		many := prefixes(policy.MaxPrefixes)
		half := func(native, nonmasq []policy.Rule) *policy.Policy {
			return build(t, func(in *policy.Input) { in.Native, in.NonMasq = native, nonmasq })
		}
		before, after := half(many[:1], many[1:]), half(many[1:], many[:1])
		for moved, i := time.Hour, 0; moved > limit; i++ {
			n.apply(before)
			if moved = took(func() { n.apply(after) }); i == 5 {
				t.Errorf("moving took %s", moved)
				break
			}
			t.Logf("65535 prefixes to another list: %s", moved)
		}
		n.right()
	})
}

// Many rules of others don't keep ours from being written and checked in time.
func TestManyForeignRules(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		n := tables(t, labtest.NewNS(t), o)
		const many = 10000 // all times grow with it
		var b strings.Builder
		b.WriteString("*nat\n:OTHER - [0:0]\n")
		for i := range many {
			fmt.Fprintf(&b, "-A OTHER -d 10.%d.%d.%d/32 -p tcp -m tcp --dport 80 -j RETURN\n", i>>16, i>>8&255, i&255)
		}
		b.WriteString("COMMIT\n")
		n.feed(b.String(), n.ipt(IPv4, "-restore"), "--noflush")
		p := build(t, listed)
		first := took(func() { n.apply(p) })
		again := took(func() { n.apply(p) })
		check := took(n.right)
		idle := took(n.right)
		n.run(n.ipt(IPv4, ""), "-t", "nat", "-F", "BAUTA-SOURCE")
		heal := took(func() { n.apply(p) })
		n.right()
		t.Logf("%d foreign rules: apply %s, apply again %s, check %s, check where nothing changed %s, heal %s", many, first, again, check, idle, heal)
		// Seconds are for a machine with many other things to do.
		if limit := labtest.Patience(10 * time.Second); check > limit || heal > limit {
			t.Errorf("check %s, heal %s", check, heal)
		}
		if out := n.run(n.ipt(IPv4, "-save"), "-t", "nat"); strings.Count(out, "-A OTHER ") != many {
			t.Error("rules of another are gone")
		}
	})
}

// BenchmarkNewConnection is what the first packet of a connection costs: forwarding,
// conntrack and rules. b.N packets, each a connection of its own.
func BenchmarkNewConnection(b *testing.B) {
	labtest.Root(b)
	for _, backend := range []Backend{NFT, Legacy} {
		for _, c := range []struct {
			name  string
			n     int
			plain bool
		}{{"sets-10", 10, false}, {"sets-16384", 16384, false}, {"sets-65536", 65536, false}, {"plain-10", 10, true}, {"plain-1000", 1000, true}, {"plain-16384", 16384, true}} {
			b.Run(string(backend)+"/"+c.name, func(b *testing.B) {
				w := newWire(b, Options{Backend: backend, env: ownLock(b)})
				w.tables.probed, w.tables.plain = c.plain, c.plain
				w.apply(build(b, func(in *policy.Input) { in.NonMasq = prefixes(c.n) }))
				p := packet.Packet{Link: packet.Raw, Src: netip.MustParseAddr("10.0.1.2"), Dst: netip.MustParseAddr("198.51.100.1"), Proto: packet.UDP, SrcPort: 40000, DstPort: 80}
				frames := make([][]byte, 20000)
				for i := range frames {
					p.SrcPort = 40000 + uint16(i)
					frames[i] = p.Build()
				}
				w.drainTo(b, "eth0")
				i := 0
				for b.Loop() {
					if i%len(frames) == 0 {
						b.StopTimer()
						w.forget()
						b.StartTimer()
					}
					if _, err := w.dev["in0"].Write(frames[i%len(frames)]); err != nil {
						b.Fatal(err)
					}
					i++
				}
			})
		}
	}
}

// drainTo throws away what leaves by a device, until the end of the test.
func (w *wire) drainTo(b *testing.B, dev string) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 2048)
		for {
			if _, err := w.dev[dev].Read(buf); err != nil {
				return
			}
		}
	}()
	b.Cleanup(func() {
		w.dev[dev].SetReadDeadline(time.Unix(1, 0))
		<-done
	})
}
