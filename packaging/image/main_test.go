package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func try(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(t.Context(), args, &out, &errs)
	return code, out.String(), errs.String()
}

func TestUsage(t *testing.T) {
	for args, want := range map[string]string{
		"":                             "-o FILE is missing",
		"-x":                           "flag provided but not defined: -x",
		"-o f extra":                   `argument "extra"`,
		"-o f -variant nft":            `-variant "nft": ebpf or iptables`,
		"-o f -arch riscv64":           `-arch "riscv64": amd64 or arm64`,
		"-o f -arch amd64,amd64":       "amd64 twice",
		"-o f -arch amd64,":            `-arch ""`,
		"-o f -ref bauta":              `-ref "bauta"`,
		"-o f -ref BAUTA.dev/bauta:v1": "-ref",
		"-o f -ref bauta.dev/bauta":    "-ref",
		"-check f -o g":                "-check goes with -unpack only",
		"-unpack d":                    "-unpack needs -check FILE",
		"-update-packages -o f":        "-update-packages goes with no other flag",
	} {
		code, stdout, stderr := try(t, strings.Fields(args)...)
		if code != 2 || stdout != "" || !strings.Contains(stderr, want) || !strings.HasPrefix(stderr, "error: ") || !strings.Contains(stderr, "\nhint: ") {
			t.Errorf("%q: exit status %d, %s%s, want %q", args, code, stdout, stderr, want)
		}
	}
	if code, stdout, stderr := try(t, "-help"); code != 0 || stderr != "" || !strings.Contains(stdout, "-variant") {
		t.Errorf("-help: %d %q %q", code, stdout, stderr)
	}
}

func TestVersionThatIsNoTag(t *testing.T) {
	t.Setenv("SOURCE_DATE_EPOCH", "1")
	code, _, stderr := try(t, "-o", filepath.Join(t.TempDir(), "f"), "-version", "v1+x", "-root", t.TempDir())
	if code != 2 || !strings.Contains(stderr, `version "v1+x" can't be a tag`) {
		t.Errorf("%d %s", code, stderr)
	}
}

func TestCheckSaysWhatIsWrong(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, []byte("nothing of the kind"), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, stderr := try(t, "-check", file); code != 1 || !strings.HasPrefix(stderr, "error: "+file+": archive: ") {
		t.Errorf("%d %s", code, stderr)
	}
	dir := filepath.Join(t.TempDir(), "d")
	if code, stdout, stderr := try(t, "-check", sample(t, "arm64"), "-unpack", dir); code != 0 || !strings.Contains(stdout, "bauta.test/bauta:v1\n  linux/arm64  sha256:") {
		t.Errorf("%d %s%s", code, stdout, stderr)
	}
	if _, err := os.Stat(filepath.Join(dir, "etc/passwd")); err != nil {
		t.Error(err)
	}
}

// newRepository makes one with a commit of a fixed date.
func newRepository(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, args := range [][]string{{"init", "-q"}, {"add", "."}, {"commit", "-q", "-m", "one"}, {"tag", "-a", "-m", "x", "v1.2.3"}} {
		if err := os.WriteFile(filepath.Join(dir, "file"), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("git", append([]string{"-C", dir, "-c", "user.name=x", "-c", "user.email=x@example.com"}, args...)...)
		cmd.Env = append(os.Environ(), "GIT_AUTHOR_DATE=2026-01-02T03:04:05Z", "GIT_COMMITTER_DATE=2026-01-02T03:04:05Z", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_SYSTEM=/dev/null")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("git %v: %v\n%s", args, err, out)
		}
	}
	return dir
}

func TestSource(t *testing.T) {
	t.Setenv("SOURCE_DATE_EPOCH", "")
	dir := newRepository(t)
	s, err := readSource(t.Context(), dir, "")
	if err != nil || s.version != "v1.2.3" || len(s.commit) != 40 || !s.date.Equal(someDate) {
		t.Errorf("%+v, %v", s, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "another"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if s, err = readSource(t.Context(), dir, "v9"); err != nil || s.version != "v9" || !strings.HasSuffix(s.commit, "-dirty") {
		t.Errorf("%+v, %v", s, err)
	}
	t.Setenv("SOURCE_DATE_EPOCH", "86400")
	if s, err = readSource(t.Context(), t.TempDir(), "v9"); err != nil || s.date.Unix() != 86400 || s.commit != "" {
		t.Errorf("without a repository: %+v, %v", s, err)
	}
	if _, err = readSource(t.Context(), t.TempDir(), ""); err == nil || !strings.Contains(err.Error(), "version: unknown") {
		t.Errorf("no version: %v", err)
	}
	t.Setenv("SOURCE_DATE_EPOCH", "yesterday")
	if _, err = readSource(t.Context(), dir, ""); err == nil || !strings.Contains(err.Error(), "yesterday") {
		t.Errorf("a date that is none: %v", err)
	}
	t.Setenv("SOURCE_DATE_EPOCH", "")
	if _, err = readSource(t.Context(), t.TempDir(), "v9"); err == nil || !strings.Contains(err.Error(), "date: unknown") {
		t.Errorf("no date: %v", err)
	}
}
