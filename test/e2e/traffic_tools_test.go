package e2e_test

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// What people type first works from a pod.
func TestTools(t *testing.T) {
	t.Parallel()
	ping, curl, iperf := labtest.Tool(t, "ping"), labtest.Tool(t, "curl"), labtest.Tool(t, "iperf3")
	eachHook(t, lab.Options{}, func(t *testing.T, n *node) {
		wire := n.watchWire()
		for _, dst := range n.WorldAddr.All() {
			for _, size := range []string{"56", "1400", "4000"} {
				if err := pings(t, n.Pods[0], ping, "-s", size, dst.String()); err != nil {
					t.Error(err)
				}
			}
			testCurl(t, n, curl, dst)
			testIperf(t, n, iperf, dst)
		}
		wire.check(t)
	})
}

// pings runs ping, which has to get an answer to each of three requests. It waits for the last
// only twice as long as any other took, and at least the interval: on a busy machine that may
// be too short, and then it asks again with a longer one.
func pings(t testing.TB, ns *lab.NS, ping string, args ...string) error {
	t.Helper()
	var errs []error
	for _, interval := range []string{"0.05", "1"} {
		out, err := ns.Run(within(t, 20*time.Second), ping, append([]string{"-n", "-c", "3", "-i", interval, "-W", "5"}, args...)...)
		if err == nil && strings.Contains(out, "3 received") {
			return nil
		}
		why := fmt.Errorf("ping %v, each %s s: %v\n%s", args, interval, err, out)
		t.Log(why)
		errs = append(errs, why)
	}
	return errors.Join(errs...)
}

func testCurl(t *testing.T, n *node, curl string, dst netip.Addr) {
	t.Helper()
	const size, seed = 10 << 20, 7
	at := server(t, lab.ServeContent, n.World, anyPort(dst))
	file := filepath.Join(n.dir, "content")
	out, err := n.Pods[0].Run(within(t, 30*time.Second), curl, "-sSf", "-g", "--noproxy", "*", "-D", "-", "-o", file,
		fmt.Sprintf("http://%s/content?n=%d&seed=%d", at, size, seed))
	if err != nil {
		t.Errorf("curl: %v\n%s", err, out)
		return
	}
	if want := n.NodeAddr.Of(dst); !strings.Contains(out, "Seen-Source: "+strings.TrimSuffix(netip.AddrPortFrom(want, 0).String(), "0")) {
		t.Errorf("curl: the server saw another source than %s:\n%s", want, out)
	}
	want := sha256.New()
	if _, err := io.Copy(want, lab.Content(seed, size)); err != nil {
		t.Fatal(err)
	}
	sum, err := exec.Command("sha256sum", file).Output()
	if err != nil || !strings.HasPrefix(string(sum), hex.EncodeToString(want.Sum(nil))) {
		t.Errorf("curl to %s: content altered (%v)", dst, err)
	}
}

func testIperf(t *testing.T, n *node, iperf string, dst netip.Addr) {
	t.Helper()
	for _, mode := range [][]string{{"-n", "20M"}, {"-R", "-n", "20M"}, {"-u", "-b", "50M", "-n", "2M"}} {
		ended := iperfServer(t, n, iperf, dst)
		out, err := n.Pods[0].Run(within(t, 30*time.Second), iperf, append([]string{"-J", "-c", dst.String()}, mode...)...)
		ended()
		var report struct {
			Error string
			End   struct {
				SumReceived struct{ Bytes int64 } `json:"sum_received"`
				Sum         struct{ Bytes int64 }
			}
		}
		if jerr := json.Unmarshal([]byte(out), &report); err != nil || jerr != nil || report.Error != "" {
			t.Errorf("iperf3 %v to %s: %v %v\n%s", mode, dst, err, jerr, out)
			continue
		}
		if report.End.SumReceived.Bytes+report.End.Sum.Bytes < 1<<20 {
			t.Errorf("iperf3 %v to %s moved nothing:\n%s", mode, dst, out)
		}
	}
}

// iperfServer starts a server for one test: one that serves several refuses a client while it still
// ends the test before. ended stops it, if it has not ended by itself.
func iperfServer(t *testing.T, n *node, iperf string, dst netip.Addr) (ended func()) {
	t.Helper()
	srv := exec.Command(iperf, "-s", "-1", "-B", dst.String(), "--forceflush")
	var log logBuffer
	srv.Stdout, srv.Stderr = &log, &log
	if err := startIn(n.World, srv); err != nil {
		t.Fatal(err)
	}
	ended = func() {
		srv.Process.Kill()
		srv.Wait()
	}
	t.Cleanup(func() {
		if srv.ProcessState == nil {
			ended()
		}
	})
	labtest.Eventually(t, 10*time.Second, func() error {
		if !strings.Contains(log.String(), "listening") {
			return fmt.Errorf("iperf3 does not listen:\n%s", log.String())
		}
		return nil
	})
	return ended
}

// Each hop of the way shows itself, by each kind of probe: ICMP errors find their
// way back to the pod.
func TestTraceroute(t *testing.T) {
	t.Parallel()
	traceroute, mtr, ping := labtest.Tool(t, "traceroute"), labtest.Tool(t, "mtr"), labtest.Tool(t, "ping")
	eachHook(t, lab.Options{Router: true}, func(t *testing.T, n *node) {
		wire := n.watchWire()
		for _, dst := range n.WorldAddr.All() {
			at := server(t, lab.EchoTCP, n.World, anyPort(dst))
			want := []string{n.PodGateway.Of(dst).String(), n.RouterAddr.Of(dst).String(), dst.String()}
			hops := func(hops func(out string) []string, tool string, args ...string) {
				args = append(args, dst.String())
				out, err := n.Pods[0].Run(within(t, 30*time.Second), tool, args...)
				if err != nil {
					t.Errorf("%s %v: %v\n%s", tool, args, err, out)
				}
				if got := hops(out); strings.Join(got, " ") != strings.Join(want, " ") {
					t.Errorf("%s %v: hops %v, want %v\n%s", tool, args, got, want, out)
				}
			}
			for _, mode := range [][]string{nil, {"-I"}, {"-T", "-p", fmt.Sprint(at.Port())}, {"-U", "-p", "53"}} {
				hops(hopsOf, traceroute, append([]string{"-n", "-q", "1", "-m", "6", "-w", "5"}, mode...)...)
			}
			for _, mode := range [][]string{nil, {"-u"}, {"-T", "-P", fmt.Sprint(at.Port())}} {
				hops(mtrHops, mtr, append([]string{"-n", "-C", "-c", "1", "-i", "0.2", "-G", "1", "-m", "6"}, mode...)...)
			}
			// The error about a ping that is too big says how big it may be.
			out, err := n.Pods[0].Run(within(t, 30*time.Second), ping, "-n", "-M", "do", "-s", "1400", "-c", "2", "-i", "0.1", "-W", "5", dst.String())
			if err == nil || !mtuOf1280.MatchString(out) {
				t.Errorf("ping -M do: %v, want to hear of the path MTU\n%s", err, out)
			}
		}
		wire.check(t)
	})
}

// ping says "mtu = 1280", "mtu=1280" or "mtu: 1280".
var mtuOf1280 = regexp.MustCompile(`(?i)mtu\W+1280\b`)

// mtrHops reads the addresses of mtr's hops that lost nothing:
// "MTR.0.95,TIME,OK,DESTINATION,1,10.0.1.1,0.00,2,...".
func mtrHops(out string) (hops []string) {
	for _, line := range strings.Split(out, "\n") {
		if f := strings.Split(line, ","); len(f) > 6 && f[2] == "OK" {
			if f[6] != "0.00" {
				f[5] += " with losses"
			}
			hops = append(hops, f[5])
		}
	}
	return hops
}

// hopsOf reads the addresses from traceroute's lines: " 1  10.0.1.1  0.031 ms".
func hopsOf(out string) (hops []string) {
	for i, line := range strings.Split(strings.TrimSpace(out), "\n") {
		if fields := strings.Fields(line); i > 0 && len(fields) > 1 {
			hops = append(hops, fields[1])
		}
	}
	return hops
}
