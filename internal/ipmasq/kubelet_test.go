package ipmasq

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// volume is a directory that is written as the kubelet's atomic writer writes a projected
// volume: the files into a new directory, to which ..data is swapped; the names that show are
// links through ..data, made after the swap and removed after it.
type volume struct {
	t       *testing.T
	dir     string
	version int
}

func newVolume(t *testing.T) *volume {
	v := &volume{t: t, dir: t.TempDir()}
	v.write(nil)
	return v
}

// write makes files, by name, the content. Each step is one that a reader may see; seen, if not
// nil, is called after it.
func (v *volume) write(files map[string]string, seen ...func(step string)) {
	v.t.Helper()
	step := func(what string, err error) {
		v.t.Helper()
		if err != nil {
			v.t.Fatal(err)
		}
		for _, f := range seen {
			f(what)
		}
	}
	old, _ := os.Readlink(filepath.Join(v.dir, "..data"))
	v.version++
	name := fmt.Sprintf("..2026_11_27_17_00_00.%d", v.version)
	step("directory", os.Mkdir(filepath.Join(v.dir, name), 0o755))
	for file, text := range files {
		step("content of "+file, os.WriteFile(filepath.Join(v.dir, name, file), []byte(text), 0o644))
	}
	step("new link", os.Symlink(name, filepath.Join(v.dir, "..data_tmp")))
	step("swap", os.Rename(filepath.Join(v.dir, "..data_tmp"), filepath.Join(v.dir, "..data")))
	for file := range files {
		if _, err := os.Lstat(filepath.Join(v.dir, file)); err != nil {
			step("name "+file, os.Symlink(filepath.Join("..data", file), filepath.Join(v.dir, file)))
		}
	}
	entries, err := os.ReadDir(v.dir)
	if err != nil {
		v.t.Fatal(err)
	}
	for _, e := range entries {
		if _, wanted := files[e.Name()]; !wanted && !strings.HasPrefix(e.Name(), "..") {
			step("no name "+e.Name(), os.Remove(filepath.Join(v.dir, e.Name())))
		}
	}
	if old != "" {
		step("old directory", os.RemoveAll(filepath.Join(v.dir, old)))
	}
}

// list is what a list says, as STATE: PREFIX ORIGIN, ...
func (v *volume) list(l List) string {
	var texts []string
	for _, r := range l.Rules {
		texts = append(texts, r.Prefix.String()+" "+strings.TrimPrefix(r.Origin, "file "+v.dir+"/"))
	}
	return string(l.State) + ": " + strings.Join(texts, ", ")
}

// The life of the ConfigMaps of a projected volume, of which each may be missing.
func TestConfigMaps(t *testing.T) {
	v := newVolume(t)
	defaults := v.list(Defaults(""))
	defaults = defaults[strings.Index(defaults, ":"):]
	const cloud, user = "nonMasqueradeCIDRs: [10.0.0.0/8]\n", "nonMasqueradeCIDRs: [192.0.2.0/24]\nmasqLinkLocal: true\nmasqLinkLocalIPv6: true\n"
	loader := Loader{Path: v.dir}
	for _, s := range []struct {
		what  string
		files map[string]string
		want  string // with an error: what it has
	}{
		{"none yet", nil, "missing" + defaults},
		{"one is created", map[string]string{"ip-masq-agent": cloud}, "list: 10.0.0.0/8 ip-masq-agent, 169.254.0.0/16 default, fe80::/10 default"},
		{"another one beside it", map[string]string{"ip-masq-agent": cloud, "user": user}, "list: 10.0.0.0/8 ip-masq-agent, 192.0.2.0/24 user"},
		{"both say the same", map[string]string{"ip-masq-agent": cloud, "user": cloud}, "list: 10.0.0.0/8 ip-masq-agent, 169.254.0.0/16 default, fe80::/10 default"},
		{"one becomes invalid", map[string]string{"ip-masq-agent": cloud, "user": "nonMasqueradeCIDRs: [10.0.0/8]"},
			"/user: nonMasqueradeCIDRs[0]: \"10.0.0/8\": not a CIDR"},
		{"it is mended", map[string]string{"ip-masq-agent": cloud, "user": user}, "list: 10.0.0.0/8 ip-masq-agent, 192.0.2.0/24 user"},
		{"the first is deleted", map[string]string{"user": user}, "list: 192.0.2.0/24 user"},
		{"its key has become empty", map[string]string{"user": ""}, "empty" + defaults},
		{"all are deleted", nil, "missing" + defaults},
		{"one is created again", map[string]string{"ip-masq-agent": user}, "list: 192.0.2.0/24 ip-masq-agent"},
	} {
		v.write(s.files)
		l, err := loader.Load()
		got := v.list(l)
		if err != nil {
			got = strings.TrimPrefix(err.Error(), v.dir)
		}
		if got != s.want {
			t.Errorf("%s:\n %s, want\n %s", s.what, got, s.want)
		}
		if err == nil && len(l.Warnings) > 0 {
			t.Errorf("%s: warnings %q", s.what, l.Warnings)
		}
		var files []string
		for _, name := range []string{"ip-masq-agent", "user"} {
			if _, ok := s.files[name]; ok {
				files = append(files, filepath.Join(v.dir, name))
			}
		}
		if diff := cmp.Diff(files, l.Files); err == nil && diff != "" {
			t.Errorf("%s: files (-want +got):\n%s", s.what, diff)
		}
	}
}

// Whatever step of a change a reader sees, it reads the old list or the new one, also when a
// range goes from one ConfigMap to another: what shows in the directory is neither for a moment.
func TestConfigMapsStepByStep(t *testing.T) {
	v := newVolume(t)
	const a, b, c = "nonMasqueradeCIDRs: [10.0.0.0/8]", "nonMasqueradeCIDRs: [11.0.0.0/8]", "nonMasqueradeCIDRs: [12.0.0.0/8]"
	rest := ", 169.254.0.0/16 default, fe80::/10 default"
	v.write(map[string]string{"cloud": a, "old": c})
	var seen []string
	v.write(map[string]string{"cloud": b, "user": c}, func(step string) {
		l, err := Load(v.dir, Cilium)
		got := fmt.Sprintf("%s %q %v", v.list(l), l.Warnings, err)
		if len(seen) == 0 || seen[len(seen)-1] != got {
			seen = append(seen, got)
		}
	})
	want := []string{"list: 10.0.0.0/8 cloud, 12.0.0.0/8 old" + rest + " [] <nil>", "list: 11.0.0.0/8 cloud, 12.0.0.0/8 user" + rest + " [] <nil>"}
	if diff := cmp.Diff(want, seen); diff != "" {
		t.Errorf("lists (-want +got):\n%s", diff)
	}
}

// A reading that meets a swap is no mixture of two versions.
func TestConfigMapsAreReadAtOneTime(t *testing.T) {
	v := newVolume(t)
	version := func(i int) map[string]string {
		text := fmt.Sprintf("nonMasqueradeCIDRs: [10.0.%d.0/24]", i%2)
		return map[string]string{"a": text, "b": text, "c": text}
	}
	v.write(version(0))
	done := make(chan struct{})
	read := 0
	var readers sync.WaitGroup
	readers.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			l, err := Load(v.dir, Cilium)
			if err != nil && strings.Contains(err.Error(), "changed while it was read") {
				continue
			}
			read++
			if err != nil || len(l.Rules) != 3 || len(l.Files) != 3 {
				t.Errorf("%s %q %v", v.list(l), l.Files, err)
				return
			}
		}
	})
	for i := range 500 {
		v.write(version(i))
	}
	close(done)
	readers.Wait()
	if read == 0 {
		t.Error("nothing was read")
	}
}
