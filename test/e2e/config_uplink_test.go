package e2e_test

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// patience is far more than anything here takes on a busy machine.
const patience = 20 * time.Second

// uplink is what arrives behind an uplink of the node, and how to send there.
type uplink struct {
	n       *node
	capture *lab.Capture
	pod     *lab.NS
	sent    int
}

// tapWorld watches the world, and sends from the first pod.
func (n *node) tapWorld() *uplink { return n.tap(n.World) }

func (n *node) tap(world *lab.NS) *uplink {
	n.t.Helper()
	c := labtest.Capture(n.t, world, "eth0", lab.CaptureOptions{Incoming: true, MaxPackets: 1 << 14})
	return &uplink{n: n, capture: c, pod: n.Pods[0]}
}

// send sends one datagram of a new flow, and returns what recognizes it. The
// destination need not exist: the node has a default route.
func (w *uplink) send(from, dst netip.Addr) (match func(lab.Packet) bool) {
	w.n.t.Helper()
	w.sent++
	mark := fmt.Appendf(nil, "<probe %d>", w.sent)
	// A port of its own: a port used before may still have a mapping to the same place.
	if !from.IsValid() {
		from = netip.IPv4Unspecified()
		if dst.Is6() {
			from = netip.IPv6Unspecified()
		}
	}
	local := netip.AddrPortFrom(from, uint16(20000+w.sent))
	conn, err := lab.DialUDP(w.n.t.Context(), w.pod, local, netip.AddrPortFrom(dst, 9))
	if err != nil {
		w.n.t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write(mark); err != nil {
		w.n.t.Fatal(err)
	}
	return func(p lab.Packet) bool { return bytes.Contains(p.Data, mark) }
}

func (w *uplink) find(match func(lab.Packet) bool) (f lab.Frame, ok bool) {
	packets := w.capture.Packets()
	if i := slices.IndexFunc(packets, match); i >= 0 {
		return lab.ParseFrame(packets[i].Data)
	}
	return f, false
}

// source returns the source with which a new flow of the pod arrives.
func (w *uplink) source(dst netip.Addr) netip.Addr { return w.sourceFrom(netip.Addr{}, dst) }

func (w *uplink) sourceFrom(from, dst netip.Addr) (src netip.Addr) {
	w.n.t.Helper()
	match := w.send(from, dst)
	labtest.Eventually(w.n.t, patience, func() error {
		f, ok := w.find(match)
		if !ok {
			return fmt.Errorf("the datagram to %s does not arrive", dst)
		}
		src = f.Src
		return nil
	})
	return src
}

// want fails the test if a new flow to dst does not arrive from src.
func (w *uplink) want(dst, src netip.Addr) {
	w.n.t.Helper()
	if got := w.source(dst); got != src {
		w.n.t.Errorf("a packet to %s came from %s, want %s", dst, got, src)
	}
}

// drops sends a new flow and waits until it is counted as dropped for a reason.
func (w *uplink) drops(dst netip.Addr, reason string) {
	w.n.t.Helper()
	before := w.n.state().Drops[reason]
	match := w.send(netip.Addr{}, dst)
	w.n.await("drop counted as "+reason, func(st agent.Status) bool { return st.Drops[reason] > before })
	if _, ok := w.find(match); ok {
		w.n.t.Errorf("a packet to %s was counted as %s, and sent", dst, reason)
	}
}

// state is the status, asked for without a process.
func (n *node) state() agent.Status {
	n.t.Helper()
	st, err := n.readStatus()
	must(n.t, err)
	return st
}

func (n *node) readStatus() (st agent.Status, err error) {
	err = n.Node.Do(func() error { // with the agent down the devices are looked up
		st, err = agent.ReadStatus(n.bpfRoot, n.runDir)
		return err
	})
	return st, err
}

// await waits until the status is as expected.
func (n *node) await(what string, ok func(agent.Status) bool) agent.Status {
	n.t.Helper()
	var st agent.Status
	labtest.Eventually(n.t, patience, func() (err error) {
		if st, err = n.readStatus(); err != nil {
			return err
		}
		if !ok(st) {
			return fmt.Errorf("%s: degraded %q, devices %+v, warnings %q", what, st.Degraded(), st.Devices, st.Warnings)
		}
		return nil
	})
	return st
}

// awaitDegraded waits until the status is degraded with a reason that has text in it.
func (n *node) awaitDegraded(text string) agent.Status {
	n.t.Helper()
	return n.await("degraded with "+text, func(st agent.Status) bool {
		return slices.ContainsFunc(st.Degraded(), func(r string) bool { return strings.Contains(r, text) })
	})
}

// awaitOK waits until nothing is degraded.
func (n *node) awaitOK() agent.Status {
	n.t.Helper()
	return n.await("OK", func(st agent.Status) bool { return len(st.Degraded()) == 0 })
}

// inKernel are the non-masquerade prefixes that packets meet now.
func (n *node) inKernel() (string, error) {
	var prefixes []netip.Prefix
	err := n.Node.Do(func() error {
		k, err := agent.Inspect(n.t.Context(), n.bpfRoot, n.runDir)
		if err != nil {
			return err
		}
		defer k.Close()
		prefixes, err = k.Exclusions()
		return err
	})
	texts := make([]string, len(prefixes))
	for i, p := range prefixes {
		texts[i] = p.String()
	}
	return strings.Join(texts, " "), err
}

// awaitKernel waits for non-masquerade prefixes and returns how long it took.
func (n *node) awaitKernel(want string) time.Duration {
	n.t.Helper()
	start := time.Now()
	labtest.Eventually(n.t, patience, func() error {
		got, err := n.inKernel()
		if err == nil && got != want {
			err = fmt.Errorf("prefixes in the kernel: %s, want %s", got, want)
		}
		return err
	})
	return time.Since(start)
}

// awaitList waits until the list is in the kernel and in the status.
func (n *node) awaitList(want string) (st agent.Status, took time.Duration) {
	n.t.Helper()
	took = n.awaitKernel(want)
	st = n.await("list", func(st agent.Status) bool {
		var list []string
		for _, r := range st.IPMasqAgent.Rules {
			list = append(list, r.Prefix.String())
		}
		return strings.Join(list, " ") == want && len(st.Degraded()) == 0
	})
	return st, took
}

// wantList compares `bpf ipmasq list`, in text and JSON.
func (n *node) wantList(want string) {
	n.t.Helper()
	prefixes := strings.Fields(want)
	if got, want := n.cli("bpf", "ipmasq", "list"), strings.Join(append([]string{"IP PREFIX/ADDRESS"}, prefixes...), "\n")+"\n"; got != want {
		n.t.Errorf("bpf ipmasq list:\n%swant:\n%s", got, want)
	}
	var list []string
	if n.cliJSON(&list, "bpf", "ipmasq", "list"); !slices.Equal(list, prefixes) {
		n.t.Errorf("bpf ipmasq list -o json: %q, want %q", list, prefixes)
	}
}

// within1s is the contract's limit for several changes of one kind. One of them
// may be late: the machine has other things to do.
func within1s(t testing.TB, what string, took ...time.Duration) {
	t.Helper()
	t.Logf("%s: %v", what, took)
	slices.Sort(took)
	if median, limit := took[(len(took)-1)/2], labtest.Patience(time.Second); median > limit {
		t.Errorf("%s: took %v, want at most %v", what, median, limit)
	}
}

// wantError checks a command that fails: its exit status, and that the first line
// of stderr is the error and has all texts in it; a text that begins with "hint"
// is looked for in the lines after it.
func wantError(t testing.TB, r result, code int, texts ...string) {
	t.Helper()
	lines := strings.Split(strings.TrimSuffix(r.stderr, "\n"), "\n")
	var err error
	if r.code != code {
		err = fmt.Errorf("exit status %d, want %d", r.code, code)
	}
	if !strings.HasPrefix(lines[0], "error: ") {
		err = errors.Join(err, errors.New("no error on the first line"))
	}
	for _, line := range lines[1:] {
		if !strings.HasPrefix(line, "hint: ") {
			err = errors.Join(err, fmt.Errorf("%q is no hint", line))
		}
	}
	for _, text := range texts {
		where := lines[0]
		if rest, ok := strings.CutPrefix(text, "hint:"); ok {
			text, where = strings.TrimSpace(rest), strings.Join(lines[1:], "\n")
		}
		if !strings.Contains(where, text) {
			err = errors.Join(err, fmt.Errorf("%q is missing", text))
		}
	}
	if err != nil {
		t.Errorf("%v\nstdout: %s\nstderr: %s", err, r.stdout, r.stderr)
	}
}
