package ipmasq

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func link(t *testing.T, target, path string) {
	t.Helper()
	if err := os.Symlink(target, path); err != nil {
		t.Fatal(err)
	}
}

func TestLoadFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "ip-masq-agent")
	l, err := Load(path, Cilium)
	if err != nil || l.State != Missing || len(l.Files) != 0 || len(l.Rules) != 13 {
		t.Fatalf("missing: %+v, %v", l, err)
	}
	write(t, path, "")
	if l, err = Load(path, Cilium); err != nil || l.State != Empty || len(l.Rules) != 13 {
		t.Fatalf("empty: %+v, %v", l, err)
	}
	write(t, path, "nonMasqueradeCIDRs: [10.0.0/8]")
	want := path + `: nonMasqueradeCIDRs[0]: "10.0.0/8": not a CIDR`
	if _, err = Load(path, Cilium); err == nil || err.Error() != want {
		t.Fatalf("error %v, want %s", err, want)
	}
	if l, err = Load(filepath.Join(dir, "no", "such", "directory"), Cilium); err != nil || l.State != Missing {
		t.Fatalf("missing directory: %+v, %v", l, err)
	}
}

// What cannot be read must be an error and not a missing file: the last good
// list stays then. A pipe must not block.
func TestLoadUnreadable(t *testing.T) {
	dir := t.TempDir()
	loop, pipe := filepath.Join(dir, "loop"), filepath.Join(dir, "pipe")
	link(t, "loop", loop)
	if err := syscall.Mkfifo(pipe, 0o644); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "file"), "")
	for _, path := range []string{loop, pipe, filepath.Join(dir, "file", "below"), dir} {
		if _, err := Load(path, Cilium); err == nil || !strings.HasPrefix(err.Error(), dir) {
			t.Errorf("%s: error %v", path, err)
		}
	}
}

func TestLoadDirectory(t *testing.T) {
	dir := t.TempDir()
	if l, err := Load(dir, Cilium); err != nil || l.State != Missing {
		t.Fatalf("no fragments: %+v, %v", l, err)
	}
	// As the kubelet mounts a ConfigMap.
	write(t, filepath.Join(dir, "..2026", "cloud"), "nonMasqueradeCIDRs: [10.0.0.0/8]")
	link(t, "..2026", filepath.Join(dir, "..data"))
	link(t, "..data/cloud", filepath.Join(dir, "cloud"))
	write(t, filepath.Join(dir, "user"), "nonMasqueradeCIDRs: [11.0.0.0/8]\nmasqLinkLocal: true")
	// Not fragments.
	write(t, filepath.Join(dir, ".user.swp"), "\x00")
	write(t, filepath.Join(dir, "user~"), "\x00")
	write(t, filepath.Join(dir, "more", "file"), "\x00")
	link(t, "nowhere", filepath.Join(dir, "dangling"))
	if err := syscall.Mkfifo(filepath.Join(dir, "pipe"), 0o644); err != nil {
		t.Fatal(err)
	}
	l, err := Load(dir, Cilium)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, r := range l.Rules {
		got = append(got, r.Prefix.String()+" "+strings.ReplaceAll(r.Origin, dir, "DIR"))
	}
	if diff := cmp.Diff([]string{"10.0.0.0/8 file DIR/cloud", "11.0.0.0/8 file DIR/user", "fe80::/10 default"}, got); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{filepath.Join(dir, "cloud"), filepath.Join(dir, "user")}, l.Files); diff != "" {
		t.Error(diff)
	}
	if len(l.Warnings) != 1 || !strings.Contains(l.Warnings[0], "dangling") {
		t.Errorf("warnings %q", l.Warnings)
	}

	write(t, filepath.Join(dir, "zz"), "nonMasqueradeCIDRs: {}")
	if _, err := Load(dir, Cilium); err == nil || !strings.HasPrefix(err.Error(), filepath.Join(dir, "zz")+": nonMasqueradeCIDRs: ") {
		t.Errorf("one bad fragment: %v", err)
	}
}

// A Loader answers what Load does, however the file changes.
func TestLoader(t *testing.T) {
	path := filepath.Join(t.TempDir(), "list")
	loader := Loader{Path: path}
	for _, text := range []string{"nonMasqueradeCIDRs: [10.0.0.0/8]", "nonMasqueradeCIDRs: [10.0.0.0/8]", "nonMasqueradeCIDRs: [10.0.0.1/8]",
		"nonMasqueradeCIDRs: [x]", "nonMasqueradeCIDRs: [x]", "-", "", "-", "nonMasqueradeCIDRs: [10.0.0.0/8]"} {
		os.Remove(path)
		if text != "-" { // no file
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		got, gotErr := loader.Load()
		want, wantErr := Load(path, "")
		if !reflect.DeepEqual(got, want) || fmt.Sprint(gotErr) != fmt.Sprint(wantErr) {
			t.Errorf("%q: %+v %v\nwant %+v %v", text, got, gotErr, want, wantErr)
		}
	}
	before, _ := loader.Load()
	again, _ := loader.Load()
	if &before.Rules[0] != &again.Rules[0] {
		t.Error("an unchanged file was parsed again")
	}
}
