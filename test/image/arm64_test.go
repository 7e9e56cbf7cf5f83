package image_test

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"bauta.dev/bauta/internal/lab/labtest"
)

// An arm64 machine is not needed to see that programs, libraries and their symbols fit together. What
// asks netfilter does not work in the emulator, which knows no such sockets.
func TestARM64ImageRuns(t *testing.T) {
	qemu := labtest.Tool(t, "qemu-aarch64")
	root := unpacked(t, "iptables", "arm64")
	emulate := func(env, program string, args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), qemu, append([]string{"-L", root, "-E", env, filepath.Join(root, program)}, args...)...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("%s %s: %v\n%s", program, strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	want := func(out string, texts ...string) {
		t.Helper()
		for _, text := range texts {
			if !strings.Contains(out, text) {
				t.Errorf("%q is missing:\n%s", text, out)
			}
		}
	}
	want(emulate("LANG=C", "bauta", "version"), "linux/arm64", "image-test")
	want(emulate("LANG=C", "usr/sbin/ip6tables-legacy", "--version"), "(legacy)")
	want(emulate("LANG=C", "usr/sbin/iptables-legacy", "-m", "comment", "--help"), "comment match options")

	// As `ldd -r` does: all libraries are loaded and all symbols looked up, and nothing is run.
	found, err := filepath.Glob(filepath.Join(root, "usr/lib/aarch64-linux-gnu/xtables/*.so"))
	if err != nil || len(found) < 100 {
		t.Fatalf("%d extensions, %v", len(found), err)
	}
	for _, file := range append(found, filepath.Join(root, "usr/sbin/xtables-nft-multi"), filepath.Join(root, "usr/sbin/xtables-legacy-multi")) {
		out := emulate("LD_WARN=yes,LD_BIND_NOW=yes,LD_TRACE_LOADED_OBJECTS=1", "usr/lib/aarch64-linux-gnu/ld-linux-aarch64.so.1", file)
		want(out, "libxtables.so.12 => ")
		if strings.Contains(out, "not found") || strings.Contains(out, "undefined symbol") {
			t.Errorf("%s:\n%s", filepath.Base(file), out)
		}
	}
}
