// Package image_test builds the images as a user does and runs what is in them, with nothing else
// around: a file that is missing, or one too many, shows here.
package image_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"
)

// ownMounts marks the process in which the tests run.
const ownMounts = "BAUTA_IMAGE_TEST_MOUNTS"

// TestMain gives the tests mounts of their own, which are gone when they end, however they end.
func TestMain(m *testing.M) {
	if os.Geteuid() != 0 || os.Getenv(ownMounts) != "" {
		os.Exit(run(m))
	}
	runtime.LockOSThread() // the child gets its signal when this thread ends
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), ownMounts+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		os.Exit(max(exit.ExitCode(), 1))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(m *testing.M) int {
	var err error
	if images.dir, err = os.MkdirTemp("", "bauta-images-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(images.dir)
	return m.Run()
}

// image runs the program that writes images, in a folder of the module.
func image(t *testing.T, module string, env []string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", append([]string{"run", "./packaging/image"}, args...)...)
	cmd.Dir = module
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("packaging/image %v: %v\n%s", args, err, out)
	}
	return string(out)
}

// images has the folders that unpacked made, by variant and architecture.
var images = struct {
	sync.Mutex
	dir   string
	roots map[string]string
}{roots: make(map[string]string)}

// unpacked builds an image, once for all tests, and returns the folder with its files.
func unpacked(t *testing.T, variant, arch string) string {
	t.Helper()
	images.Lock()
	defer images.Unlock()
	name := variant + "-" + arch
	if images.roots[name] == "" {
		file, root := filepath.Join(images.dir, name+".tar"), filepath.Join(images.dir, name)
		image(t, "../..", nil, "-o", file, "-variant", variant, "-arch", arch, "-version", "image-test")
		image(t, "../..", nil, "-check", file, "-unpack", root)
		images.roots[name] = root
	}
	return images.roots[name]
}
