package e2e_test

import (
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// The world's second address and the pod's: a NAT shows its kind when there is
// more than one of either.
var (
	secondWorld = lab.Pair{V4: netip.MustParseAddr("192.0.2.20"), V6: netip.MustParseAddr("2001:db8:2::20")}
	secondPod   = lab.Pair{V4: netip.MustParseAddr("10.0.1.200"), V6: netip.MustParseAddr("fd00:1::200")}
)

// Tools made to classify NATs see ours as docs/rfc.md describes it: mapping that
// does not depend on the endpoint, filtering that depends on address and port.
func TestNATBehavior(t *testing.T) {
	t.Parallel()
	discover, stun := labtest.Tool(t, "turnutils_natdiscovery"), labtest.Tool(t, "stun")
	turnserver, stund := labtest.Tool(t, "turnserver"), labtest.Tool(t, "stund")
	n := startNode(t, lab.Options{})
	for i, bits := range []int{24, 64} {
		must(t, n.World.AddAddr("eth0", netip.PrefixFrom(secondWorld.All()[i], bits)))
		inner := secondPod.All()[i]
		must(t, n.Pods[0].AddAddr("eth0", netip.PrefixFrom(inner, inner.BitLen())))
		must(t, n.Node.AddRoute(lab.Route{Dst: netip.PrefixFrom(inner, inner.BitLen()), Dev: "pod0"}))
	}
	wire := n.watchWire()

	args := []string{"-n", "-v", "--no-tls", "--no-dtls", "--no-cli", "--stun-only", "-l", "stdout", "--simple-log",
		"--pidfile", filepath.Join(n.dir, "turn.pid"), "-b", filepath.Join(n.dir, "turndb")}
	for _, a := range append(n.WorldAddr.All(), secondWorld.All()...) {
		args = append(args, "-L", a.String())
	}
	log := n.runInWorld(turnserver, args...)
	n.runInWorld(stund, "-h", n.WorldAddr.V4.String(), "-a", secondWorld.V4.String(), "-p", "4478", "-o", "4479")
	labtest.Eventually(t, 10*time.Second, func() error {
		if strings.Count(log.String(), "UDP listener opened") < 8 {
			return fmt.Errorf("turnserver does not listen:\n%s", log.String())
		}
		return nil
	})

	// The tools wait seconds for what must not come, so all run at once.
	var tools sync.WaitGroup
	defer tools.Wait()
	run := func(check func(out string) error, name string, args ...string) {
		tools.Go(func() {
			// The exit status of stun is its verdict.
			out, err := n.Pods[0].Run(within(t, time.Minute), name, args...)
			if cerr := check(out); cerr != nil {
				t.Errorf("%s %v: %v (%v)\n%s", filepath.Base(name), args, cerr, err, out)
			}
		})
	}
	for _, dst := range n.WorldAddr.All() {
		pod, node := n.PodAddrs[0].Of(dst).String(), n.NodeAddr.Of(dst)
		// A port of the pool is kept, another becomes the same one towards all remotes.
		run(mapsTo(node, 40000, "Endpoint Independent Mapping"), discover, "-m", "-L", pod, "-l", "40000", dst.String())
		run(mapsTo(node, 0, "Endpoint Independent Mapping"), discover, "-m", "-L", pod, "-l", "4000", dst.String())
		run(mapsTo(node, 40001, "Address and Port Dependent Filtering"), discover, "-f", "-L", pod, "-l", "40001", dst.String())
		// The node's own external address is the node's: nothing is turned round for pods.
		run(func(out string) error {
			if strings.Contains(out, "Received a request") {
				return fmt.Errorf("hairpinned")
			}
			return mapsTo(node, 40002, "STUN receive timeout")(out)
		}, discover, "-H", "-L", pod, "-l", "40002", dst.String())
		// Two inner sockets with one port, one remote: two external ports.
		run(func(out string) error {
			if seen := reflexive(out); len(seen) != 2 || seen[0] == seen[1] || seen[0].Addr() != node || seen[1].Addr() != node {
				return fmt.Errorf("two sockets seen as %v", seen)
			}
			return nil
		}, discover, "-c", "-L", pod, "-l", "40003", "-A", secondPod.Of(dst).String(), dst.String())
	}
	run(func(out string) error {
		const want = "Independent Mapping, Port Dependent Filter, preserves ports, no hairpin"
		if !strings.Contains(out, want) {
			return fmt.Errorf("want %q", want)
		}
		return nil
	}, stun, n.WorldAddr.V4.String()+":4478", "-p", "40010")
	tools.Wait()
	wire.check(t)
	for _, a := range append(n.WorldAddr.All(), secondWorld.All()...) {
		if strings.Contains(n.log.String(), a.String()) {
			t.Errorf("the agent's log names the destination %s (RFC 6888 REQ-12)", a)
		}
	}
}

// runInWorld starts a server that ends with the test, and returns its output.
func (n *node) runInWorld(name string, args ...string) *logBuffer {
	n.t.Helper()
	srv, log := exec.Command(name, args...), new(logBuffer)
	srv.Stdout, srv.Stderr = log, log
	if err := startIn(n.World, srv); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() {
		srv.Process.Kill()
		srv.Wait()
	})
	return log
}

var reflexiveLine = regexp.MustCompile(`UDP reflexive addr: *(\S+):(\d+)`)

// reflexive are the external sockets that natdiscovery was told, in order.
func reflexive(out string) (seen []netip.AddrPort) {
	for _, m := range reflexiveLine.FindAllStringSubmatch(out, -1) {
		addr, err := netip.ParseAddr(m[1])
		var port uint16
		if _, perr := fmt.Sscan(m[2], &port); err == nil && perr == nil {
			seen = append(seen, netip.AddrPortFrom(addr, port))
		}
	}
	return seen
}

// mapsTo checks what natdiscovery found, and that all its remotes saw one external
// socket at the address; with that port, unless it is 0.
func mapsTo(addr netip.Addr, port uint16, verdict string) func(out string) error {
	return func(out string) error {
		seen := reflexive(out)
		switch {
		case !strings.Contains(out, verdict):
			return fmt.Errorf("want %q", verdict)
		case len(seen) == 0 || len(slices.Compact(slices.Clone(seen))) != 1 || seen[0].Addr() != addr:
			return fmt.Errorf("seen as %v, want one port of %s", seen, addr)
		case port != 0 && seen[0].Port() != port:
			return fmt.Errorf("seen as %v, want port %d", seen, port)
		case seen[0].Port() < 32768:
			return fmt.Errorf("seen as %v, which is not of the pool", seen)
		}
		return nil
	}
}
