package agent

import (
	"bytes"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"bauta.dev/bauta/internal/config"
	"bauta.dev/bauta/internal/ipmasq"
	"bauta.dev/bauta/internal/policy"
)

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

const (
	goodList = "nonMasqueradeCIDRs: [10.0.0.0/8]\nmasqLinkLocal: true\nmasqLinkLocalIPv6: true\n"
	badList  = "nonMasqueradeCIDRs: [10.0.0.0/99]\n"
)

func TestIPMasqFileKeepsTheLastGoodList(t *testing.T) {
	pinned := earlier{
		applied:    true,
		exclusions: []netip.Prefix{netip.MustParsePrefix("10.5.0.0/16"), netip.MustParsePrefix("10.6.0.0/16")},
		file: &PolicyFile{
			IPMasqAgent: IPMasqStatus{Enabled: true},
			NonMasq:     []policy.Rule{{Prefix: netip.MustParsePrefix("10.5.0.0/16"), Origin: "file old"}},
		},
	}
	off, none, unknown := pinned, pinned, pinned
	off.file = &PolicyFile{}
	none.applied = false
	unknown.file = nil
	const good, bad = goodList, badList
	for _, c := range []struct {
		name   string
		before earlier
		files  []string // "" is no file
		origin IPMasqOrigin
		want   string
		broken bool
	}{
		{"good", pinned, []string{good}, FromFile, "10.0.0.0/8 (file PATH)", false},
		{"goes bad", pinned, []string{good, bad}, FromLastGood, "10.0.0.0/8 (file PATH)", true},
		{"stays bad", pinned, []string{good, bad, bad}, FromLastGood, "10.0.0.0/8 (file PATH)", true},
		{"is mended", pinned, []string{good, bad, good}, FromFile, "10.0.0.0/8 (file PATH)", false},
		{"is deleted", pinned, []string{good, ""}, FromFile, "11 and 2", false},
		{"is deleted after it went bad", pinned, []string{good, bad, ""}, FromFile, "11 and 2", false},
		{"bad at first, pinned", pinned, []string{bad}, FromPinned, "10.5.0.0/16 (file old), 10.6.0.0/16 (pinned)", true},
		{"bad at first, still bad", pinned, []string{bad, bad}, FromPinned, "10.5.0.0/16 (file old), 10.6.0.0/16 (pinned)", true},
		{"bad at first, pinned without policy.json", unknown, []string{bad}, FromPinned, "10.5.0.0/16 (pinned), 10.6.0.0/16 (pinned)", true},
		{"bad at first, pinned without ip-masq-agent", off, []string{bad}, FromDefaults, "11 and 2", true},
		{"bad at first, policy.json without policy", none, []string{bad}, FromDefaults, "11 and 2", true},
		{"bad at first, nothing", earlier{}, []string{bad}, FromDefaults, "11 and 2", true},
		{"no file", pinned, []string{""}, FromFile, "11 and 2", false},
	} {
		path := filepath.Join(t.TempDir(), "list")
		f := &ipMasqFile{loader: ipmasq.Loader{Path: path, Profile: ipmasq.Cilium}}
		for _, text := range c.files {
			if text == "" {
				os.Remove(path)
			} else {
				write(t, path, text)
			}
			f.reload(time.Now(), c.before, quiet)
		}
		got := strings.ReplaceAll(rules(f.list.Rules), path, "PATH")
		if len(f.list.Rules) == 13 {
			got = "11 and 2"
		}
		if f.origin != c.origin || got != c.want || (f.err != nil) != c.broken {
			t.Errorf("%s: %s: %s (%v)\nwant %s: %s", c.name, f.origin, got, f.err, c.origin, c.want)
		}
		s := f.status()
		if c.broken && !strings.Contains(s.LastError, "10.0.0.0/99") || !c.broken && s.LastError != "" {
			t.Errorf("%s: last error %q", c.name, s.LastError)
		}
	}
}

func TestRejectionIsLoggedOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "list")
	write(t, path, badList)
	var out bytes.Buffer
	log := slog.New(slog.NewTextHandler(&out, nil))
	f := &ipMasqFile{loader: ipmasq.Loader{Path: path}}
	for range 3 {
		f.reload(time.Now(), earlier{}, log)
	}
	if n := strings.Count(out.String(), "level=ERROR"); n != 1 {
		t.Errorf("%d errors:\n%s", n, out.String())
	}
}

func TestNodesFileKeepsTheLastGoodList(t *testing.T) {
	path := filepath.Join(t.TempDir(), "nodes")
	before := earlier{file: &PolicyFile{Nodes: []policy.NodeAddr{
		{Addr: netip.MustParseAddr("192.0.2.5"), Origin: "file " + path},
		{Addr: netip.MustParseAddr("192.0.2.6"), Origin: "option node-addresses"},
	}}}
	for _, c := range []struct {
		name   string
		before earlier
		files  []string
		want   string
		broken bool
	}{
		{"good", before, []string{"192.0.2.1 a\n192.0.2.2 b ExternalIP\n"}, "192.0.2.1 192.0.2.2", false},
		{"empty", before, []string{"192.0.2.1\n", "# none\n"}, "", false},
		{"goes bad", before, []string{"192.0.2.1\n", "192.0.2.x\n"}, "192.0.2.1", true},
		{"is deleted", before, []string{"192.0.2.1\n", ""}, "192.0.2.1", true},
		{"bad at first", before, []string{"192.0.2.x\n", "192.0.2.x\n"}, "192.0.2.5", true},
		{"bad at first, nothing", earlier{}, []string{"192.0.2.x\n"}, "", true},
		{"missing at first, comes", earlier{}, []string{"", "192.0.2.1\n"}, "192.0.2.1", false},
	} {
		f := &nodesFile{path: path}
		for _, text := range c.files {
			os.Remove(path)
			if text != "" {
				write(t, path, text)
			}
			f.reload(time.Now(), c.before, quiet)
		}
		var got []string
		for _, n := range f.nodes {
			got = append(got, n.Addr.String())
		}
		if strings.Join(got, " ") != c.want || (f.err != nil) != c.broken {
			t.Errorf("%s: %v (%v), want %s", c.name, got, f.err, c.want)
		}
	}
	for what, problem := range map[string]string{
		filepath.Dir(path):   "not a regular file",
		"/nonexistent/nodes": "nodes-file /nonexistent/nodes: no such file or directory",
	} {
		if _, err := readNodes(what); err == nil || !strings.Contains(err.Error(), problem) {
			t.Errorf("%s: %v, want %s", what, err, problem)
		}
	}
}

func TestOptionFilesSayWhatNeedsARestart(t *testing.T) {
	path := filepath.Join(t.TempDir(), "bauta.yaml")
	write(t, path, "pod-cidrs: 10.1.0.0/16\n")
	src := config.Sources{File: path}
	f := &optionFiles{running: loadFrom(t, src), sources: src}
	for _, c := range []struct{ text, changed, err string }{
		{"pod-cidrs: 10.1.0.0/16\n", "", ""},
		{"pod-cidrs: 10.2.0.0/16\ndevices: eth0\n", "devices pod-cidrs", ""},
		{"pod-cidrs: 10.2.0.0/99\n", "devices pod-cidrs", "10.2.0.0/99"},
		{"pod-cidrs: 10.1.0.0/16\n", "", ""},
	} {
		write(t, path, c.text)
		f.reload(quiet)
		if got := strings.Join(f.changed, " "); got != c.changed {
			t.Errorf("%q: changed %q, want %q", c.text, got, c.changed)
		}
		if (f.err != nil) != (c.err != "") || f.err != nil && !strings.Contains(f.err.Error(), c.err) {
			t.Errorf("%q: error %v, want %q", c.text, f.err, c.err)
		}
	}
	none := &optionFiles{running: load(t, "pod-cidrs=10.1.0.0/16")}
	if none.reload(quiet); none.err != nil {
		t.Errorf("without files: %v", none.err)
	}
}
