package cli

import (
	"bytes"
	"context"
	"flag"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/testscript"

	"bauta.dev/bauta/internal/config"
)

var update = flag.Bool("update", false, "write goldens and generated pages instead of comparing")

// TestScripts runs the command scripts. Besides testscript's own commands they
// have `bauta STATUS ARG...`, which runs Main in-process and wants that exit
// status; its output shows the script's directory as $WORK. Main gets the
// options' environment variables; AS_ROOT=1 makes it believe that it is root.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:           "testdata",
		UpdateScripts: *update,
		Cmds:          map[string]func(*testscript.TestScript, bool, []string){"bauta": runScripted},
	})
}

func runScripted(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: bauta STATUS ARG...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	var stdout, stderr bytes.Buffer
	got := Main(Env{
		Context: context.Background(),
		Stdout:  &stdout,
		Stderr:  &stderr,
		Environ: scriptEnviron(ts.Getenv),
		Root:    ts.Getenv("AS_ROOT") == "1",
		Version: "v1.2.3",
	}, args[1:])
	work := ts.Getenv("WORK")
	ts.Stdout().Write([]byte(strings.ReplaceAll(stdout.String(), work, "$WORK")))
	ts.Stderr().Write([]byte(strings.ReplaceAll(stderr.String(), work, "$WORK")))
	if got != want {
		ts.Fatalf("exit status %d, want %d\n%s%s", got, want, &stdout, &stderr)
	}
}

func scriptEnviron(getenv func(string) string) []string {
	environ := []string{}
	for _, o := range config.Options() {
		for _, name := range o.Names() {
			if v := getenv(config.EnvName(name)); v != "" {
				environ = append(environ, config.EnvName(name)+"="+v)
			}
		}
	}
	return environ
}

// golden compares text with a file that a person has read.
func golden(t *testing.T, path, got string) {
	t.Helper()
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("%v (go test ./internal/cli -update writes it)", err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s differs (go test ./internal/cli -update writes it), -want +got:\n%s", path, diff)
	}
}
