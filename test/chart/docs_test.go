package chart_test

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// Values that the documents tell to set are accepted, each line as it stands there.
func TestDocumentedValues(t *testing.T) {
	t.Parallel()
	found := 0
	for _, page := range []string{"../../README.md", "../../docs/kubernetes.md", "../../docs/operations.md"} {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile("--set ([^\\s`]+)").FindAllStringSubmatch(string(text), -1) {
			found++
			helm(t, "template", "bauta", chartDir, "--kube-version", kubeVersion, "--set", m[1])
		}
	}
	if found < 5 {
		t.Errorf("%d values found in the documents", found)
	}
}

// Values that docs/kubernetes.md names are values.
func TestNamedValues(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../../docs/kubernetes.md")
	if err != nil {
		t.Fatal(err)
	}
	known := make(map[string]bool)
	readSchema(t).walk("", nil, func(path string, _ property, _ any) { known[path] = true })
	found := 0
	for _, m := range regexp.MustCompile("`([a-zA-Z0-9.]+)(: [^`]*|=[^`]*)?`").FindAllStringSubmatch(string(page), -1) {
		top, _, below := strings.Cut(m[1], ".")
		if _, isValue := known[top]; !isValue || !below && m[1] == strings.ToLower(m[1]) {
			continue // a word, or a path of something else
		}
		if found++; !known[m[1]] {
			t.Errorf("docs/kubernetes.md: %s is no value", m[1])
		}
	}
	if found < 20 {
		t.Errorf("%d values found", found)
	}
}
