package iptables

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/policy"
)

// binDir is a directory with links to some of the node's binaries; a script in it
// stands for one that fails.
func binDir(t testing.TB, names ...string) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range names {
		if err := os.Symlink(labtest.Tool(t, name), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func fake(t testing.TB, dir, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+text), 0o755); err != nil {
		t.Fatal(err)
	}
}

// family4 and family6 are the names of a backend's binaries.
func family4(b Backend) []string {
	return []string{"iptables-" + string(b) + "-save", "iptables-" + string(b) + "-restore"}
}

func family6(b Backend) []string {
	return []string{"ip6tables-" + string(b) + "-save", "ip6tables-" + string(b) + "-restore"}
}

func hints(err error) string {
	var h *Error
	if errors.As(err, &h) {
		return strings.Join(h.Hints, "; ")
	}
	return ""
}

func TestNoBinary(t *testing.T) {
	for _, b := range []Backend{"", NFT, Legacy} {
		_, err := Open(context.Background(), Options{Backend: b, dirs: []string{t.TempDir()}})
		if !errors.Is(err, ErrNoBinary) || !strings.Contains(hints(err), "install the package iptables") {
			t.Errorf("backend %q: %v, hints %q", b, err, hints(err))
		}
	}
	err := labtest.NewNS(t).Do(func() error {
		if _, err := Inspect(context.Background(), Options{dirs: []string{t.TempDir()}}); !errors.Is(err, ErrNone) {
			t.Errorf("inspect: %v", err)
		}
		removed, err := Remove(context.Background(), Options{dirs: []string{t.TempDir()}})
		if len(removed) > 0 {
			t.Errorf("removed %v", removed)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

func TestNoIP6tables(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		o.dirs = []string{binDir(t, append(family4(o.Backend), "ipset")...)}
		n := tables(t, labtest.NewNS(t), o)
		err := n.applyError(build(t, nil))
		if !errors.Is(err, ErrNoBinary) || !strings.Contains(err.Error(), "IPv6: ip6tables-"+string(o.Backend)) || !strings.Contains(hints(err), "enable-ipv6-masquerade=false") {
			t.Errorf("got %v, hints %q", err, hints(err))
		}
		if out := n.run(n.ipt(IPv4, "-save")); !strings.Contains(out, "-A POSTROUTING -j BAUTA-POSTROUTING") {
			t.Errorf("IPv4 was not written:\n%s", out)
		}
		n.right()
		n.apply(build(t, func(in *policy.Input) { in.IPv6 = false }))
		if w := strings.Join(n.tables.Warnings(), "\n"); !strings.Contains(w, "no ip6tables-restore: IPv6 is not masqueraded") {
			t.Errorf("warnings: %s", w)
		}
	})
}

// What iptables says where the kernel has no nat table for IPv6; this kernel has one.
func TestNoNATForIPv6(t *testing.T) {
	for _, c := range []struct{ name, says string }{
		{"legacy", "ip6tables-save v1.8.9 (legacy): Cannot initialize: Table does not exist (do you need to insmod?)"},
		{"old", "ip6tables-restore v1.8.4 (legacy): can't initialize ip6tables table `nat': Table does not exist (do you need to insmod?)"},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := Options{Backend: Legacy, env: ownLock(t), dirs: []string{binDir(t, append(family4(Legacy), "ipset")...)}}
			real := labtest.Tool(t, "ip6tables-legacy-save")
			fake(t, o.dirs[0], "ip6tables-legacy-save", `[ "$2" = nat ] || exec `+real+` "$@"
echo "`+strings.ReplaceAll(c.says, "`", "\\`")+`" >&2
exit 1
`)
			fake(t, o.dirs[0], "ip6tables-legacy-restore", "exit 1\n")
			n := tables(t, labtest.NewNS(t), o)
			err := n.applyError(build(t, nil))
			if !errors.Is(err, errNoTable) || !errors.Is(err, ErrPartly) || !strings.HasPrefix(err.Error(), "IPv6: table nat: ") || !strings.Contains(hints(err), "ip6table_nat") {
				t.Errorf("got %v, hints %q", err, hints(err))
			}
			if out := n.run("iptables-legacy-save"); !strings.Contains(out, "-A POSTROUTING -j BAUTA-POSTROUTING") {
				t.Errorf("IPv4 was not written:\n%s", out)
			}
		})
	}
}

// The same by the nft backend, where the kernel lacks the type of chain.
func TestNoNATForIPv6InNFT(t *testing.T) {
	o := Options{Backend: NFT, dirs: []string{binDir(t, append(family4(NFT), "ip6tables-nft-save", "ipset")...)}}
	fake(t, o.dirs[0], "ip6tables-nft-restore", `echo "ip6tables-restore v1.8.9 (nf_tables): CHAIN_ADD failed (No such file or directory): chain POSTROUTING" >&2
exit 4
`)
	n := tables(t, labtest.NewNS(t), o)
	err := n.applyError(build(t, nil))
	if !errors.Is(err, errNoTable) || !errors.Is(err, ErrPartly) || !strings.HasPrefix(err.Error(), "IPv6: ") || !strings.Contains(hints(err), "nft_chain_nat") {
		t.Errorf("got %v, hints %q", err, hints(err))
	}
	if out := n.run("iptables-nft-save"); !strings.Contains(out, "-A POSTROUTING -j BAUTA-POSTROUTING") {
		t.Errorf("IPv4 was not written:\n%s", out)
	}
}

// A restore that writes the first table and then fails leaves nothing behind.
func TestRestoreFailingHalfWay(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		o.dirs = []string{binDir(t, append(append(family4(o.Backend), family6(o.Backend)...), "ipset")...)}
		for _, f := range families {
			name := f.binary() + "-" + string(o.Backend) + "-restore"
			real := labtest.Tool(t, name)
			os.Remove(filepath.Join(o.dirs[0], name))
			fake(t, o.dirs[0], name, `fail=`+o.dirs[0]+`/fail
[ -e $fail ] || exec `+real+` "$@"
case "$*" in *--test*) exec `+real+` "$@" ;; esac
rm $fail
sed '/^COMMIT/q' | `+real+` "$@"
echo "iptables-restore v1.8.9 (legacy): Set of rules failed" >&2
echo "Error occurred at line: 2" >&2
exit 2
`)
		}
		n := tables(t, labtest.NewNS(t), o)
		failNext := func() {
			if err := os.WriteFile(o.dirs[0]+"/fail", nil, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		before := func() string {
			return strings.Join(append(ours(n.run(n.ipt(IPv4, "-save"))), n.run("ipset", "save")), "\n")
		}
		for _, p := range []*policy.Policy{build(t, nil), build(t, listed), build(t, func(in *policy.Input) {
			listed(in)
			in.NonMasq = rules("10.0.0.0/8", "172.16.0.0/12")
			in.UnknownProtocols = policy.UnknownDrop
		})} {
			p4, err := policy.Build(ipv4Only(p.Input()))
			if err != nil {
				t.Fatal(err)
			}
			was := before()
			failNext()
			if err := n.applyError(p4); err == nil || !strings.Contains(err.Error(), "Set of rules failed") {
				t.Fatalf("got %v", err)
			}
			if now := before(); now != was {
				t.Errorf("left half-applied:\n%s\nit was\n%s", now, was)
			}
			n.apply(p4)
			n.right()
		}
	})
}

func ipv4Only(in policy.Input) policy.Input {
	in.IPv6 = false
	return in
}

// The lock of legacy is waited for as long as said, and the error says who holds it.
func TestXtablesLockHeld(t *testing.T) {
	o := Options{Backend: Legacy, env: ownLock(t), LockTimeout: time.Second}
	n := tables(t, labtest.NewNS(t), o)
	file, err := os.Create(o.lockFile())
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	err = n.applyError(build(t, func(in *policy.Input) { in.IPv6 = false }))
	if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), "iptables.test, pid ") {
		t.Errorf("got %v", err)
	}
	if took := time.Since(start); took < 900*time.Millisecond || took > labtest.Patience(2500*time.Millisecond) {
		t.Errorf("it took %s", took)
	}
	t.Logf("%v; hints: %s; after %s", err, hints(err), time.Since(start).Round(time.Millisecond))
	if out := n.run("iptables-legacy-save"); len(ours(out)) > 0 {
		t.Errorf("something was written:\n%s", out)
	}
	file.Close()
	n.apply(build(t, nil))
	n.right()
}

// A set of another program is not taken.
func TestSetNameTaken(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		n := tables(t, labtest.NewNS(t), o)
		n.run("ipset", "create", "bauta-nonmasq-4", "hash:ip")
		n.run("ipset", "add", "bauta-nonmasq-4", "192.0.2.77")
		err := n.applyError(build(t, listed))
		if err == nil || !strings.Contains(err.Error(), "IPv4: set bauta-nonmasq-4: another program's, of type hash:ip") || !strings.Contains(hints(err), "ipset rename") {
			t.Errorf("got %v, hints %q", err, hints(err))
		}
		if out := n.run("ipset", "list", "bauta-nonmasq-4"); !strings.Contains(out, "192.0.2.77") {
			t.Errorf("it was changed:\n%s", out)
		}
		// The other family works, and the name is free again after the advice.
		if out := n.run(n.ipt(IPv6, "-save")); len(ours(out)) == 0 {
			t.Error("IPv6 was not written")
		}
		n.run("ipset", "rename", "bauta-nonmasq-4", "other")
		n.apply(build(t, listed))
		n.right()
	})
}

// Without the library of the match, or without sets in the kernel, there are plain rules.
func TestNoSets(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		libs, err := filepath.Glob("/usr/lib/*/xtables")
		if err != nil || len(libs) == 0 {
			t.Fatalf("where does iptables have its libraries? %v", err)
		}
		dir := t.TempDir()
		entries, err := os.ReadDir(libs[0])
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if e.Name() != "libxt_set.so" {
				os.Symlink(filepath.Join(libs[0], e.Name()), filepath.Join(dir, e.Name()))
			}
		}
		o.env = append(o.env, "XTABLES_LIBDIR="+dir)
		n := tables(t, labtest.NewNS(t), o)
		p := build(t, listed)
		n.apply(p)
		n.right()
		if out := n.run("ipset", "list", "-n"); out != "" {
			t.Errorf("sets: %s", out)
		}
		if out := n.run(n.ipt(IPv4, "-save"), "-t", "nat"); !strings.Contains(out, "-A BAUTA-DESTINATION -d 172.16.0.0/12 -m comment --comment pass-nonmasq -j RETURN") {
			t.Errorf("no plain rule:\n%s", out)
		}
		w := strings.Join(n.tables.Warnings(), "\n")
		if !strings.Contains(w, "no sets (") || !strings.Contains(w, "plain rules for prefixes") {
			t.Errorf("warnings: %s", w)
		}
		t.Log(w)
		n.do(func() error {
			i, err := Inspect(context.Background(), o)
			if err != nil {
				return err
			}
			prefixes, err := i.Exclusions()
			if len(prefixes) != 3 || prefixes[0] != netip.MustParsePrefix("172.16.0.0/12") {
				t.Errorf("exclusions %v", prefixes)
			}
			return err
		})
	})
}

func TestDeviceNames(t *testing.T) {
	for _, name := range []string{"eth+", "-x", "!x", "a b", `a"b`, "a'b", `a\b`, "#x", "é", "", "a-name-too-long-"} {
		if CheckDevice(name) == nil {
			t.Errorf("%q passes", name)
		}
	}
	for _, name := range []string{"eth0", "eth0.7", "wg-home", "a+b", "br_lan", "veth@x", "x!"} {
		if err := CheckDevice(name); err != nil {
			t.Error(err)
		}
	}
}

// A device that rules can't name is left out; the others are masqueraded on.
func TestOddDeviceIsLeftOut(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		n := tables(t, labtest.NewNS(t), o)
		with := func(names ...string) *policy.Policy {
			return build(t, func(in *policy.Input) {
				listed(in)
				for i, name := range names {
					in.Devices = append(in.Devices, policy.Device{Name: name, Index: 200 + i, Ethernet: true, IPv4: netip.MustParseAddr("198.51.100.1")})
				}
			})
		}
		err := n.applyError(with("eth+", "é", "eth1"))
		if !errors.Is(err, ErrPartly) || !strings.Contains(err.Error(), `device "eth+"`) || !strings.Contains(err.Error(), `device "é"`) || !strings.Contains(hints(err), "devices=!NAME") {
			t.Errorf("got %v, hints %q", err, hints(err))
		}
		n.right()
		n.do(func() error {
			i, err := Inspect(context.Background(), o)
			if err != nil {
				return err
			}
			if devices, _ := i.Devices(); strings.Join(devices, " ") != "eth0 eth1" {
				t.Errorf("devices %q", devices)
			}
			return nil
		})
		for _, f := range families {
			for _, rule := range ours(n.run(n.ipt(f, "-save"))) {
				if strings.Contains(rule, "eth+") || strings.Contains(rule, "é") {
					t.Error(rule)
				}
			}
		}
		n.apply(with("eth1"))
		n.right()
		// Where no device is left nothing is in force.
		err = n.applyError(build(t, func(in *policy.Input) { in.Devices[0].Name = "eth+" }))
		if err == nil || errors.Is(err, ErrPartly) || !strings.Contains(err.Error(), `device "eth+"`) {
			t.Errorf("the only one: %v", err)
		}
	})
}

// Rules of ours in the other backend, as after a change of the node's iptables, go; rules of
// others there are a warning.
func TestRulesOfBothBackends(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		ns := labtest.NewNS(t)
		old := o
		old.Backend = o.Backend.other()
		before := tables(t, ns, old)
		before.apply(build(t, listed))
		before.run("iptables-"+string(old.Backend), "-A", "FORWARD", "-j", "ACCEPT")
		before.run("iptables-"+string(o.Backend), "-A", "FORWARD", "-j", "ACCEPT")
		n := tables(t, ns, o)
		n.apply(build(t, listed))
		n.right()
		if left := ours(before.run(before.ipt(IPv4, "-save")) + before.run(before.ipt(IPv6, "-save"))); len(left) > 0 {
			t.Errorf("left: %s", left)
		}
		if w := strings.Join(n.tables.Warnings(), "\n"); !strings.Contains(w, "rules of both backends (1 of nft, 1 of legacy)") {
			t.Errorf("warnings: %s", w)
		}
	})
}

// What the other backend's rules hold must not keep sets that the new policy has no use
// for from being destroyed.
func TestSetsOfTheOtherBackend(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		ns := labtest.NewNS(t)
		old := o
		old.Backend = o.Backend.other()
		tables(t, ns, old).apply(build(t, listed))
		n := tables(t, ns, o)
		n.apply(build(t, nil)) // without lists
		n.right()
		n.do(func() error {
			names, err := setNames()
			if len(names) > 0 {
				t.Errorf("left: %s", names)
			}
			return err
		})
	})
}

// A rule of others that only speaks of our chains stays.
func TestCommentThatNamesAChain(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		n := tables(t, labtest.NewNS(t), o)
		for _, table := range tableNames {
			n.run(n.ipt(IPv4, ""), "-t", table, "-A", "POSTROUTING", "-m", "comment", "--comment", "behind -j BAUTA-POSTROUTING", "-j", "ACCEPT")
		}
		n.apply(build(t, nil))
		n.right()
		for _, table := range tableNames {
			if out := n.run(n.ipt(IPv4, ""), "-t", table, "-S", "POSTROUTING"); !strings.Contains(out, "--comment \"behind") {
				t.Errorf("gone from %s:\n%s", table, out)
			}
		}
	})
}
