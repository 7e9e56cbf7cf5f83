package e2e_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// fileOf is an ip-masq-agent file with one prefix, and the list it makes.
func fileOf(prefix string) (content, list string) {
	return "nonMasqueradeCIDRs:\n- " + prefix + "\n", "169.254.0.0/16 " + prefix + " fe80::/10"
}

// numbered are prefixes that sort behind 169.254.0.0/16.
func numbered(i int) string { return fmt.Sprintf("198.51.100.%d/32", i) }

// must is for steps of a story that can only fail with the machine.
func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// However the file is changed, the change is in the kernel within a second.
func TestIPMasqReload(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "ip-masq-agent")
	content, list := fileOf(numbered(0))
	must(t, os.WriteFile(path, []byte(content), 0o600))
	n := startNode(t, lab.Options{}, "--enable-ip-masq-agent", "--ip-masq-agent-config-path="+path)
	w := n.tapWorld()
	n.awaitKernel(list)

	i := 0
	for _, way := range []struct {
		name   string
		change func(content string)
	}{
		{"written in place", func(content string) { must(t, os.WriteFile(path, []byte(content), 0o600)) }},
		{"renamed over", func(content string) {
			must(t, os.WriteFile(path+".new", []byte(content), 0o600))
			must(t, os.Rename(path+".new", path))
		}},
		{"removed and created", func(content string) {
			must(t, os.Remove(path))
			must(t, os.WriteFile(path, []byte(content), 0o600))
		}},
		{"written by pieces", func(content string) {
			f, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
			must(t, err)
			for _, b := range []byte(content) {
				_, err := f.Write([]byte{b})
				must(t, err)
			}
			must(t, f.Close())
		}},
	} {
		var took []time.Duration
		for range 3 {
			i++
			content, list := fileOf(numbered(i))
			way.change(content)
			took = append(took, n.awaitKernel(list))
		}
		within1s(t, way.name, took...)
	}
	w.want(netip.MustParseAddr("198.51.100.1"), n.NodeAddr.V4)
	w.want(netip.AddrFrom4([4]byte{198, 51, 100, byte(i)}), n.PodAddrs[0].V4)

	// A truncated file that is written at once is never seen as an empty one.
	for range 5 {
		_, before := fileOf(numbered(i))
		i++
		content, after := fileOf(numbered(i))
		start := time.Now()
		must(t, os.Truncate(path, 0))
		must(t, os.WriteFile(path, []byte(content), 0o600))
		atOnce := time.Since(start) < 80*time.Millisecond // the watcher waits for 100 without a change
		labtest.Eventually(t, patience, func() error {
			got, err := n.inKernel()
			must(t, err)
			if atOnce && got != before && got != after {
				t.Errorf("seen in between: %s", got)
			}
			if got != after {
				return fmt.Errorf("in the kernel: %s", got)
			}
			return nil
		})
	}

	bad := func(item string) { must(t, os.WriteFile(path, []byte("nonMasqueradeCIDRs: ["+item+"]\n"), 0o600)) }
	bad("10.0.0.0/99")
	n.awaitDegraded("10.0.0.0/99")
	bad("10.0.0.0/98") // another mistake: the message follows
	n.awaitDegraded("10.0.0.0/98")
	wantBrief(t, n, path, "nonMasqueradeCIDRs[0]", "10.0.0.0/98")
	_, list = fileOf(numbered(i))
	n.wantList(list)
	replace := func(content string) { // at once, so that there is one change
		must(t, os.WriteFile(path+".new", []byte(content), 0o600))
		must(t, os.Rename(path+".new", path))
	}
	content, list = fileOf(numbered(i + 1))
	start := time.Now()
	replace(content)
	n.awaitKernel(list)
	n.await("applied", func(st agent.Status) bool { return st.Agent.LastApply.After(start) })
	if st := n.awaitOK(); st.IPMasqAgent.LastError != "" {
		t.Errorf("after recovery: %+v", st.IPMasqAgent)
	}
	// A file that comes back as it was leaves nothing to apply. Every half minute all is applied
	// again whatever came: on a slow machine that may be in between, but not each time.
	for try := 1; ; try++ {
		applied := n.state().Agent.LastApply
		replace(fmt.Sprintf("%s\n# the same, %d", content, try))
		edited := time.Now()
		n.await("reloaded", func(st agent.Status) bool { return st.IPMasqAgent.LastReload.After(edited) })
		if n.state().Agent.LastApply.Equal(applied) {
			break
		}
		if try == 10 {
			t.Fatal("an edit that changes nothing was applied")
		}
	}
}

// A ConfigMap as the kubelet mounts it: the files are links to ..data, which is a
// link to the directory of one version.
func TestIPMasqReloadConfigMap(t *testing.T) {
	t.Parallel()
	for _, asDirectory := range []bool{false, true} {
		dir := t.TempDir()
		version := 0
		swap := func(prefix string) {
			version++
			name := fmt.Sprintf("..2026_%d", version)
			must(t, os.Mkdir(filepath.Join(dir, name), 0o700))
			content, _ := fileOf(prefix)
			must(t, os.WriteFile(filepath.Join(dir, name, "ip-masq-agent"), []byte(content), 0o600))
			must(t, os.Symlink(name, filepath.Join(dir, "..data_tmp")))
			must(t, os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")))
			if version == 1 {
				must(t, os.Symlink("..data/ip-masq-agent", filepath.Join(dir, "ip-masq-agent")))
				return
			}
			must(t, os.RemoveAll(filepath.Join(dir, fmt.Sprintf("..2026_%d", version-1))))
		}
		t.Run(fmt.Sprintf("directory %v", asDirectory), func(t *testing.T) {
			path := dir
			if !asDirectory {
				path = filepath.Join(dir, "ip-masq-agent")
			}
			swap(numbered(0))
			n := startNode(t, lab.Options{}, "--enable-ip-masq-agent", "--ip-masq-agent-config-path="+path)
			var took []time.Duration
			for i := range 4 {
				swap(numbered(i + 1))
				_, list := fileOf(numbered(i + 1))
				took = append(took, n.awaitKernel(list))
			}
			within1s(t, "..data swapped", took...)
			if st := n.state(); len(st.IPMasqAgent.Files) != 1 || filepath.Base(st.IPMasqAgent.Files[0]) != "ip-masq-agent" {
				t.Errorf("files %q", st.IPMasqAgent.Files)
			}
		})
	}
}

// A directory of fragments, which is not there at first.
func TestIPMasqFragments(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "later", "ip-masq-agent.d")
	n := startNode(t, lab.Options{}, "--enable-ip-masq-agent", "--ip-masq-agent-config-path="+dir)
	n.awaitKernel(allDefaults)
	put := func(name, content string) {
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600))
	}
	var took []time.Duration
	step := func(want string) {
		t.Helper()
		_, d := n.awaitList(want)
		took = append(took, d)
	}
	must(t, os.MkdirAll(filepath.Join(dir, "sub"), 0o700))
	put("a.yaml", "nonMasqueradeCIDRs: [198.51.100.0/24]")
	step("169.254.0.0/16 198.51.100.0/24 fe80::/10")
	put("b.json", `{"nonMasqueradeCIDRs": ["2001:db8:99::/64"]}`)
	put(".hidden", "nonMasqueradeCIDRs: [10.0.0.0/8]")
	put("a.yaml~", "nonMasqueradeCIDRs: [10.0.0.0/8]")
	put("sub/c.yaml", "nonMasqueradeCIDRs: [10.0.0.0/8]")
	step("169.254.0.0/16 198.51.100.0/24 2001:db8:99::/64 fe80::/10")
	put("c.yaml", "masqLinkLocal: true")
	step("198.51.100.0/24 2001:db8:99::/64 fe80::/10")
	for _, r := range n.state().IPMasqAgent.Rules {
		want := map[string]string{
			"198.51.100.0/24": "file " + dir + "/a.yaml", "2001:db8:99::/64": "file " + dir + "/b.json", "fe80::/10": "default",
		}[r.Prefix.String()]
		if r.Origin != want {
			t.Errorf("%s is from %q, want %q", r.Prefix, r.Origin, want)
		}
	}
	for _, text := range []string{"198.51.100.0/24", dir + "/a.yaml", dir + "/b.json"} {
		if out := n.cli("status"); !strings.Contains(out, text) {
			t.Errorf("status does not have %q:\n%s", text, out)
		}
	}
	put("d.yaml", "nonMasqueradeCIDRs: [oops]")
	n.awaitDegraded("oops")
	wantBrief(t, n, dir+"/d.yaml", "nonMasqueradeCIDRs[0]", "oops")
	n.wantList("198.51.100.0/24 2001:db8:99::/64 fe80::/10")
	must(t, os.Remove(filepath.Join(dir, "d.yaml")))
	n.awaitOK()
	must(t, os.Remove(filepath.Join(dir, "b.json")))
	step("198.51.100.0/24 fe80::/10")
	must(t, os.RemoveAll(dir))
	step(allDefaults)
	within1s(t, "fragments", took...)
}

// The largest list that the contract allows, and one that is larger by one.
func TestIPMasqFullList(t *testing.T) {
	t.Parallel()
	full := func(count4, count6 int) string {
		var b strings.Builder
		b.WriteString("nonMasqueradeCIDRs:\n")
		for i := range count4 {
			fmt.Fprintf(&b, "- %d.%d.%d.0/24\n", 11+i>>16, i>>8&0xff, i&0xff)
		}
		for i := range count6 {
			fmt.Fprintf(&b, "- 2001:%x:%x::/48\n", 0xdb8+i>>16, i&0xffff)
		}
		return b.String()
	}
	n := newNode(t, lab.Options{})
	path := n.write("ip-masq-agent", "")
	n.start(podCIDRs, "--enable-ip-masq-agent", "--ip-masq-agent-config-path="+path)
	w := n.tapWorld()
	inKernel := func() (list []string) {
		n.cliJSON(&list, "bpf", "ipmasq", "list")
		return list
	}
	start := time.Now()
	n.write("ip-masq-agent", full(65536, 65536))
	labtest.Eventually(t, time.Minute, func() error { // the log is cheaper than the list
		if !strings.Contains(n.log.String(), "prefixes=131074 ") || strings.Count(n.log.String(), "policy applied") < 2 {
			return errors.New("not applied")
		}
		return nil
	})
	took := time.Since(start)
	t.Logf("131074 prefixes in the kernel %d ms after the file was written", took.Milliseconds())
	list := inKernel()
	if len(list) != 2*65536+2 || !slices.Contains(list, "11.255.255.0/24") || !slices.Contains(list, "2001:db8:ffff::/48") {
		t.Fatalf("%d prefixes in the kernel", len(list))
	}
	w.want(netip.MustParseAddr("11.255.255.9"), n.PodAddrs[0].V4)
	w.want(netip.MustParseAddr("12.0.0.9"), n.NodeAddr.V4)
	w.want(netip.MustParseAddr("2001:db8:ffff::9"), n.PodAddrs[0].V6)
	if took > 10*time.Second {
		t.Errorf("took %v", took)
	}
	n.write("ip-masq-agent", full(1, 65537))
	labtest.Eventually(t, patience, func() error {
		if !strings.Contains(n.log.String(), "more than 65536 prefixes") {
			return errors.New("65537 prefixes are not rejected")
		}
		return nil
	})
	n.awaitDegraded("65536") // published a moment later
	wantBrief(t, n, path, "nonMasqueradeCIDRs", "65536")
	if list := inKernel(); len(list) != 2*65536+2 {
		t.Errorf("%d prefixes in the kernel after one too many", len(list))
	}
	start = time.Now()
	content, small := fileOf(numbered(1))
	n.write("ip-masq-agent", content)
	n.awaitKernel(small)
	t.Logf("and gone after %d ms", time.Since(start).Milliseconds())
	n.awaitOK()
}
