package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// company is what two pods have with the world while somebody changes who
// translates it: connections that live all the time, and new ones.
type company struct {
	t       *testing.T
	n       *node
	talk    *talk
	wire    *wire
	steady  *load // flows without a handshake
	storm   *load
	dismiss context.CancelFunc
	begun   time.Time
}

// stormTime bounds how long pods connect all the time.
const stormTime = time.Minute

// keepCompany opens connections, in both families. In a third of them two pods have the same port
// towards the same remote, so one of them has another outside; in a third the port is not of the pool.
func keepCompany(t *testing.T, n *node, connections int) *company {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), stormTime)
	c := &company{t: t, n: n, talk: newTalk(t), wire: n.watchWire(), dismiss: cancel, begun: time.Now(),
		steady: &load{ctx: ctx, done: make(map[string]int)}, storm: &load{ctx: ctx, done: make(map[string]int)}}
	t.Cleanup(c.end)
	c.talk.every = 4 * pause // so that the machine has time for new ones
	var servers []netip.AddrPort
	for _, a := range n.WorldAddr.All() {
		servers = append(servers, server(t, lab.EchoTCP, n.World, anyPort(a)))
	}
	for i := range connections {
		at, pod, port := servers[i%2], i/2%2, uint16(50000+i/4)
		switch i / 4 % 3 {
		case 1:
			port = uint16(40000 + i)
		case 2:
			port = uint16(10000 + i)
		}
		c.talk.open(t, n.Pods[pod], netip.AddrPortFrom(n.PodAddrs[pod].Of(at.Addr()), port), at)
	}
	kept := 0
	for i, seen := range c.talk.seen {
		if seen.Addr() != n.NodeAddr.Of(seen.Addr()) {
			t.Fatalf("seen as %s", seen)
		}
		if seen.Port() == netip.MustParseAddrPort(c.talk.conns[i].LocalAddr().String()).Port() {
			kept++
		}
	}
	if kept < connections/4 || kept > connections*7/8 {
		t.Errorf("%d of %d connections kept their port: not much of a mixture", kept, connections)
	}
	for i := range 4 {
		c.exchangeUDP(n.WorldAddr.All()[i%2], uint16(20000+30000*(i/2)+i))
		c.ping(n.WorldAddr.All()[i%2], uint16(700+i))
		c.connect(n.WorldAddr.All()[i%2])
	}
	c.talk.goesOn(t, "before")
	return c
}

// exchangeUDP is a flow of datagrams whose source must stay the same.
func (c *company) exchangeUDP(dst netip.Addr, port uint16) {
	at := server(c.t, lab.EchoUDP, c.n.World, anyPort(dst))
	conn, err := lab.DialUDP(within(c.t, patience), c.n.Pods[0], netip.AddrPortFrom(c.n.PodAddrs[0].Of(dst), port), at)
	must(c.t, err)
	c.t.Cleanup(func() { conn.Close() })
	var first netip.AddrPort
	c.steady.work("udp "+family(dst), pause, func() error {
		limit, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		seen, err := lab.AskUDPOn(limit, conn, []byte("hello"))
		switch {
		case err != nil:
			return err
		case first.IsValid() && seen != first:
			return fmt.Errorf("seen as %s, before as %s", seen, first)
		case seen.Addr() != c.n.NodeAddr.Of(dst):
			return fmt.Errorf("seen as %s", seen)
		}
		first = seen
		return nil
	})
}

func (c *company) ping(dst netip.Addr, id uint16) {
	var seq atomic.Uint32
	c.steady.work("ping "+family(dst), pause, func() error {
		err := errors.New("no answer")
		for range 5 { // an echo request is not repeated by itself
			limit, cancel := context.WithTimeout(context.Background(), 3*time.Second)
			_, err = lab.Ping(limit, c.n.Pods[0], dst, id, uint16(seq.Add(1)), 100)
			cancel()
			if err == nil {
				break
			}
		}
		return err
	})
}

// connect makes new connections all the time.
func (c *company) connect(dst netip.Addr) {
	at := server(c.t, lab.EchoTCP, c.n.World, anyPort(dst))
	c.storm.work("connect "+family(dst), 10*time.Millisecond, func() error {
		limit, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		seen, conn, err := lab.AskTCP(limit, c.n.Pods[1], netip.AddrPort{}, at)
		if err != nil {
			return err
		}
		defer conn.Close()
		if seen.Addr() != c.n.NodeAddr.Of(dst) {
			return fmt.Errorf("seen as %s", seen)
		}
		return exchange(conn)
	})
}

// end stops what is new.
func (c *company) end() {
	c.dismiss()
	c.steady.group.Wait()
	c.storm.group.Wait()
}

// goesOn fails the test if something was lost so far.
func (c *company) goesOn(when string) {
	c.t.Helper()
	c.talk.goesOn(c.t, when)
	for _, l := range []*load{c.steady, c.storm} {
		l.mu.Lock()
		for _, err := range l.errs[:min(3, len(l.errs))] {
			c.t.Errorf("%s: %d errors, among them: %v", when, len(l.errs), err)
		}
		l.errs = nil
		l.mu.Unlock()
	}
	c.wire.check(c.t)
}

// check ends it all.
func (c *company) check() {
	c.t.Helper()
	c.end()
	c.goesOn("at the end")
	n := 0
	for _, done := range c.storm.done {
		n += done
	}
	c.t.Logf("%.0f new connections a second", float64(n)/time.Since(c.begun).Seconds())
	c.t.Logf("exchanges of %d connections: %d, the longest after %v; meanwhile %v, new %v",
		len(c.talk.conns), c.talk.rounds.Load(), c.talk.longest(), c.steady.done, c.storm.done)
}

var (
	emptyOfNFT = regexp.MustCompile(`^\s*(table .*|chain [A-Z]+ \{|type .* hook .*|\}|#.*)?$`)
	nftCounter = regexp.MustCompile(`counter packets \d+ bytes \d+`)
)

// everything is what any mode could leave behind: rules of all kinds, sets, devices, filters
// and pins.
func (n *node) everything() string { return n.allRules() + n.footprint() + n.pins() }

// allRules are rules of all kinds, and sets.
func (n *node) allRules() string {
	n.t.Helper()
	var out strings.Builder
	out.WriteString(n.ownThings())
	out.WriteString("$ nft list ruleset\n")
	for line := range strings.Lines(n.tables("nft", "list", "ruleset")) {
		if line = strings.TrimRight(line, "\n"); !emptyOfNFT.MatchString(line) {
			out.WriteString(nftCounter.ReplaceAllString(line, "counter") + "\n")
		}
	}
	return out.String()
}

// pins are the names below the agent's directory of bpffs.
func (n *node) pins() string {
	n.t.Helper()
	var out strings.Builder
	out.WriteString("$ pins\n")
	err := filepath.WalkDir(n.bpfRoot, func(path string, _ os.DirEntry, err error) error {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		out.WriteString(strings.TrimPrefix(path, n.bpfRoot) + "\n")
		return err
	})
	must(n.t, err)
	return out.String()
}

// killAt kills the agent when it logs a text that it has not logged before this call.
func (n *node) killAt(since int, text string) {
	n.t.Helper()
	deadline := time.Now().Add(labtest.Patience(30 * time.Second))
	for !strings.Contains(n.log.String()[since:], text) {
		if n.agent.ended() || time.Now().After(deadline) {
			n.t.Fatalf("the agent did not log %q", text)
		}
		time.Sleep(time.Millisecond)
	}
	n.kill()
}
