// Package chart_test renders the Helm chart with the real helm, and checks what comes out:
// against goldens that a person has read, against Kubernetes' own schemas, and against the
// agent, which has to understand what the chart tells it.
//
// It needs no cluster. helm and kubeconform are built at the first run (tools/helm/build),
// and the schemas come from the modules that publish them.
package chart_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"
)

var update = flag.Bool("update", false, "write goldens and generated pages instead of comparing")

const (
	chartDir    = "../../charts/bauta"
	kubeVersion = "1.36.3" // of goldens and schemas
	namespace   = "kube-system"
)

// work is a directory for what several tests use.
var work string

// sets are the values in testdata that the chart is rendered with.
var sets = []string{"defaults", "ipmasq", "adopted", "iptables", "everything", "podmonitor", "cleanup"}

// tools builds what is not built yet, and returns the directory.
var tools = sync.OnceValues(func() (string, error) {
	cmd := exec.Command("../../tools/helm/build")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("tools/helm/build: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
})

// tool runs helm or kubeconform and returns what it printed.
func tool(t *testing.T, name string, stdin []byte, args ...string) (stdout, stderr string, ok bool) {
	t.Helper()
	dir, err := tools()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), filepath.Join(dir, name), args...)
	// Nothing of the developer's own: neither plugins nor a cluster.
	home := t.TempDir()
	cmd.Env = append(os.Environ(), "HELM_CONFIG_HOME="+home, "HELM_CACHE_HOME="+home, "HELM_DATA_HOME="+home, "KUBECONFIG="+filepath.Join(home, "none"))
	var outBuf, errBuf bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), &outBuf, &errBuf
	err = cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return outBuf.String(), errBuf.String(), err == nil
}

// helm is a run of helm that has to succeed.
func helm(t *testing.T, args ...string) string {
	t.Helper()
	stdout, stderr, ok := tool(t, "helm", nil, args...)
	if !ok {
		t.Fatalf("helm %s:\n%s%s", strings.Join(args, " "), stdout, stderr)
	}
	return stdout
}

func valuesFile(set string) string { return filepath.Join("testdata", set+".values.yaml") }

// template renders the chart with a set and further arguments for helm.
func template(t *testing.T, set string, args ...string) string {
	t.Helper()
	return helm(t, append([]string{"template", "bauta", chartDir, "--namespace", namespace, "--kube-version", kubeVersion, "--values", valuesFile(set)}, args...)...)
}

// object is a rendered manifest.
type object map[string]any

// objects are the manifests of a rendering, by kind and name.
func objects(t *testing.T, rendered string) map[string]object {
	t.Helper()
	found := make(map[string]object)
	for i, text := range regexp.MustCompile(`(?m)^---$`).Split(rendered, -1) {
		var o object
		if err := yaml.UnmarshalStrict([]byte(text), &o); err != nil {
			t.Fatalf("document %d: %v\n%s", i, err, text)
		}
		if o == nil {
			continue
		}
		key := fmt.Sprintf("%s %s", o["kind"], o.get("metadata", "name"))
		if found[key] != nil {
			t.Errorf("%s: rendered twice", key)
		}
		found[key] = o
	}
	return found
}

// get returns what is at the end of a path of keys; nil: nothing.
func (o object) get(path ...string) any {
	var at any = map[string]any(o)
	for _, key := range path {
		m, _ := at.(map[string]any)
		at = m[key]
	}
	return at
}

// into decodes a part of a manifest.
func into[T any](t *testing.T, from any) (v T) {
	t.Helper()
	text, err := json.Marshal(from)
	if err == nil {
		err = json.Unmarshal(text, &v)
	}
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// golden compares text with a file that a person has read.
func golden(t *testing.T, path, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(got, "\n")); diff != "" {
		t.Errorf("%s (-want +got; -update writes it):\n%s", path, diff)
	}
}

func TestMain(m *testing.M) {
	flag.Parse()
	dir, err := os.MkdirTemp("", "bauta-chart-")
	if err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
	work = dir
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}
