package image_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// copyModule puts the module's files, as they are now, into a repository of their own with one commit.
func copyModule(t *testing.T, to string) {
	t.Helper()
	list, err := exec.Command("git", "-C", "../..", "ls-files", "-co", "--exclude-standard", "-z").Output()
	if err != nil {
		t.Fatal(err)
	}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(list), "\x00"), "\x00") {
		data, err := os.ReadFile(filepath.Join("../..", name))
		if os.IsNotExist(err) {
			continue // removed, and the removal not yet committed
		}
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(to, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, args := range [][]string{{"init", "-q"}, {"add", "-A"}, {"commit", "-q", "-m", "all"}} {
		cmd := exec.Command("git", append([]string{"-C", to, "-c", "user.name=x", "-c", "user.email=x@example.com"}, args...)...)
		cmd.Env = append(os.Environ(), "GIT_AUTHOR_DATE=2026-01-02T03:04:05Z", "GIT_COMMITTER_DATE=2026-01-02T03:04:05Z", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_SYSTEM=/dev/null")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("git %v: %v\n%s", args, err, out)
		}
	}
}

// One commit in two folders, by users with other settings, one after the other.
func TestSameCommitSameBytes(t *testing.T) {
	one, two := filepath.Join(t.TempDir(), "one"), filepath.Join(t.TempDir(), "elsewhere", "two")
	copyModule(t, one)
	copyModule(t, two)
	tag := exec.Command("git", "-C", two, "-c", "user.name=x", "-c", "user.email=x@example.com", "tag", "-a", "-m", "x", "v7.0.0")
	if out, err := tag.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, args := range [][]string{
		{"-version", "v1", "-arch", "arm64"},
		{"-version", "v1", "-variant", "iptables"},
	} {
		a, b := filepath.Join(t.TempDir(), "a.tar"), filepath.Join(t.TempDir(), "b.tar")
		image(t, one, []string{"TZ=UTC", "SOURCE_DATE_EPOCH="}, append(args, "-o", a)...)
		image(t, two, []string{"TZ=Asia/Tokyo", "LC_ALL=C.UTF-8", "GOFLAGS=-buildvcs=true", "GOAMD64=v2", "CGO_ENABLED=1", "SOURCE_DATE_EPOCH="}, append(args, "-o", b)...)
		files, err := filepath.Glob(filepath.Dir(a) + "/*")
		if err != nil || len(files) < 2 {
			t.Fatalf("%v, %v: want an archive and SBOMs", files, err)
		}
		for _, file := range files {
			twin := filepath.Join(filepath.Dir(b), strings.Replace(filepath.Base(file), "a.tar", "b.tar", 1))
			first, err1 := os.ReadFile(file)
			second, err2 := os.ReadFile(twin)
			if err1 != nil || err2 != nil || !bytes.Equal(first, second) {
				t.Errorf("%v: %s differs (%v, %v)", args, filepath.Base(file), err1, err2)
			}
		}
	}
}
