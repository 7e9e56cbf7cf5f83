package lab_test

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

func ownNS(t *testing.T) string {
	t.Helper()
	s, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestDoReturnsToOwnNamespace(t *testing.T) {
	t.Parallel()
	a, b := labtest.NewNS(t), labtest.NewNS(t)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before, sentinel := ownNS(t), errors.New("from inside")
	var inA, inB, backInA string
	err := a.Do(func() error {
		inA = ownNS(t)
		err := b.Do(func() error { inB = ownNS(t); return sentinel })
		backInA = ownNS(t)
		return err
	})
	if !errors.Is(err, sentinel) {
		t.Errorf("error of the function: %v", err)
	}
	if inA == before || inB == before || inA == inB || backInA != inA || ownNS(t) != before {
		t.Errorf("outside %s, in a %s, in b %s, back in a %s, outside %s", before, inA, inB, backInA, ownNS(t))
	}
	// t.Fatal in a function leaves by Goexit; a panic takes the same way.
	func() {
		defer func() { recover() }()
		a.Do(func() error { panic("inside") })
	}()
	if now := ownNS(t); now != before {
		t.Errorf("after a panic in %s, want %s", now, before)
	}
}

func TestSysctlIsOfTheNamespace(t *testing.T) {
	t.Parallel()
	ns := labtest.NewNS(t)
	const key = "net.ipv4.ip_default_ttl"
	outside, err := os.ReadFile("/proc/sys/net/ipv4/ip_default_ttl")
	if err != nil {
		t.Fatal(err)
	}
	if err := ns.Sysctl(key, "99"); err != nil {
		t.Fatal(err)
	}
	if got, err := ns.ReadSysctl(key); got != "99" || err != nil {
		t.Errorf("inside: %s %v, want 99", got, err)
	}
	if now, _ := os.ReadFile("/proc/sys/net/ipv4/ip_default_ttl"); string(now) != string(outside) {
		t.Errorf("outside: %s, was %s", now, outside)
	}
	if err := ns.Sysctl("net.ipv4.no_such_key", "1"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("unknown key: %v", err)
	}
	peer := labtest.NewNS(t)
	link(t, ns, peer, lab.LinkOpts{})
	// A per-device key exists only in the namespace of the device.
	if err := ns.Sysctl("net/ipv4/conf/v0/forwarding", "1"); err != nil {
		t.Error(err)
	}
}

func link(t *testing.T, a, b *lab.NS, o lab.LinkOpts) {
	t.Helper()
	if err := lab.Link(a, "v0", b, "v0", o); err != nil {
		t.Fatal(err)
	}
}

func TestRunAndStartAreInside(t *testing.T) {
	t.Parallel()
	ns := labtest.NewNS(t)
	var inside string
	ns.Do(func() error { inside = ownNS(t); return nil })
	out, err := ns.Run(t.Context(), "readlink", "/proc/self/ns/net")
	if err != nil || strings.TrimSpace(out) != inside {
		t.Errorf("run: %q %v, want %s", out, err, inside)
	}
	out, err = ns.Run(t.Context(), "sh", "-c", "echo out; echo err >&2; exit 3")
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 3 || out != "out\nerr\n" {
		t.Errorf("run of a failure: %q %v", out, err)
	}
}

func TestLinkProperties(t *testing.T) {
	t.Parallel()
	a, b := labtest.NewNS(t), labtest.NewNS(t)
	link(t, a, b, lab.LinkOpts{MTU: 1400, NoOffload: true,
		AddrsA: []netip.Prefix{netip.MustParsePrefix("10.9.0.1/24")},
		AddrsB: []netip.Prefix{netip.MustParsePrefix("10.9.0.2/24"), netip.MustParsePrefix("fd09::2/64")}})
	for _, ns := range []*lab.NS{a, b} {
		ns.Do(func() error {
			dev, err := net.InterfaceByName("v0")
			if err != nil || dev.MTU != 1400 {
				t.Errorf("v0: %+v %v, want mtu 1400", dev, err)
			}
			return nil
		})
	}
	if got, err := b.Addrs("v0"); err != nil || len(got) != 2 {
		t.Errorf("addresses: %v %v", got, err)
	}
	if err := b.DelAddr("v0", netip.MustParsePrefix("fd09::2/64")); err != nil {
		t.Error(err)
	}
	if got, _ := b.Addrs("v0"); len(got) != 1 {
		t.Errorf("addresses after deletion: %v", got)
	}
	via := lab.Route{Dst: netip.MustParsePrefix("10.8.0.0/16"), Via: netip.MustParseAddr("10.9.0.2"), MTU: 1300}
	if err := errors.Join(a.AddRoute(via), a.AddRoute(via), a.DelRoute(via)); err != nil {
		t.Error(err)
	}
	if err := a.DelRoute(via); err == nil {
		t.Error("a route was deleted twice")
	}
	if err := errors.Join(a.SetDown("v0"), a.Rename("v0", "v1"), a.SetUp("v1"), a.DeleteLink("v1")); err != nil {
		t.Error(err)
	}
	if got, _ := b.Links(); len(got) != 1 {
		t.Errorf("links after the other end was deleted: %v", got)
	}
	if err := a.SetUp("v1"); err == nil {
		t.Error("a deleted link was set up")
	}
}

func TestOffloadsAreOff(t *testing.T) {
	t.Parallel()
	ethtool := labtest.Tool(t, "ethtool")
	a, b := labtest.NewNS(t), labtest.NewNS(t)
	link(t, a, b, lab.LinkOpts{NoOffload: true})
	for _, ns := range []*lab.NS{a, b} {
		out, err := ns.Run(t.Context(), ethtool, "-k", "v0")
		if err != nil {
			t.Fatal(err, out)
		}
		for _, f := range []string{"tx-checksumming", "tx-tcp-segmentation", "tx-tcp6-segmentation", "generic-segmentation-offload", "generic-receive-offload"} {
			if !strings.Contains(out, f+": off") {
				t.Errorf("%s is not off:\n%s", f, out)
			}
		}
	}
}

func TestTunnelDevices(t *testing.T) {
	t.Parallel()
	ns := labtest.NewNS(t)
	tun, err := ns.AddTUN("tun0")
	if err != nil {
		t.Fatal(err)
	}
	defer tun.Close()
	if err := ns.AddAddr("tun0", netip.MustParsePrefix("10.7.0.1/24")); err != nil {
		t.Fatal(err)
	}
	ctx := within(t, 5*time.Second)
	go lab.Ping(ctx, ns, netip.MustParseAddr("10.7.0.2"), 5, 6, 0)
	tun.SetReadDeadline(time.Now().Add(5 * time.Second))
	buf := make([]byte, 2000)
	for {
		n, err := tun.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		// IPv6 control traffic of the new device comes first.
		if f, ok := lab.ParseIP(buf[:n]); ok && f.Dst == netip.MustParseAddr("10.7.0.2") {
			break
		}
	}
	if err := ns.AddVXLAN("vx0", 7, netip.MustParseAddr("10.7.0.1"), netip.MustParseAddr("10.7.0.2")); err != nil {
		t.Error(err)
	}
}

func TestBPFFSIsUnmounted(t *testing.T) {
	labtest.Root(t)
	dir := t.TempDir()
	unmount, err := lab.MountBPFFS(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "sub"), 0o700); err != nil {
		t.Error(err)
	}
	for range 2 {
		if err := unmount(); err != nil {
			t.Error(err)
		}
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("still mounted: %v", left)
	}
	if other := labtest.BPFFS(t); other == dir {
		t.Error("same directory twice")
	}
}
