package nodes

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"bauta.dev/bauta/internal/advice"
	"bauta.dev/bauta/internal/nodes/nodestest"
)

// Open says what is missing, and asks no API server.
func TestOpen(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	dir := t.TempDir()
	files := 0
	file := func(text string) string {
		files++
		path := filepath.Join(dir, fmt.Sprintf("config%d", files))
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for _, c := range []struct{ name, config, err, hint string }{
		{"", "", "the name of this node is not known", "K8S_NODE_NAME"},
		{"a", "", "in-cluster configuration", "k8s-kubeconfig-path"},
		{"a", filepath.Join(dir, "none"), "none: no such file or directory", "kubeconfig"},
		{"a", dir, dir + ": is a directory", "kubeconfig"},
		{"a", file("rubbish"), "/config1: not a kubeconfig: couldn't get version/kind", "current context"},
		{"a", file(""), "/config2: no current context", "current context"},
		{"a", file(strings.ReplaceAll(nodestest.Kubeconfig("https://192.0.2.1:6443", "x"), "current-context:", "# ")), "/config3: no current context", "current context"},
		{"a", file(nodestest.Kubeconfig(":::", "x")), "/config4: ", "current context"},
	} {
		_, err := Open(Options{Kubeconfig: c.config, NodeName: c.name})
		var hints []string
		if a, ok := errors.AsType[*advice.Error](err); ok {
			hints = a.Hints
		}
		if err == nil || !strings.Contains(err.Error(), c.err) || !strings.Contains(strings.Join(hints, " "), c.hint) {
			t.Errorf("%q %q: %v %q", c.name, c.config, err, hints)
		}
	}
	c, err := Open(Options{Kubeconfig: file(nodestest.Kubeconfig("https://192.0.2.1:6443", "x")), NodeName: "a"})
	if err != nil || c.Snapshot().Synced {
		t.Errorf("%v", err)
	}
}
