package chart_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"sigs.k8s.io/yaml"
)

// The schemas that manifests are checked against are Kubernetes' own and the Prometheus
// operator's own, from the modules that publish them, by the hash of their content.
var (
	kubernetes = map[string]string{
		kubeVersion: "h1:qDQdoMiluAE2Eab6Fa52YV+WjiGz9mZFFoagEA6cI+o=",
		oldestKube:  "h1:MrlKXh9uhLIJpyxOeXhcndzRVSvwiV9iJ8NgH8nqPsg=",
	}
	operator = struct{ module, sum string }{
		"github.com/prometheus-operator/prometheus-operator@v0.92.1", "h1:rHWuFo6SVya4FBSCNg2DCzyc4xAv54zk3eDTzp5mQZc=",
	}
)

// oldestKube is of the oldest minor release that the chart can be installed on.
const oldestKube = "1.30.14"

// moduleDir is the source of a module, downloaded once.
func moduleDir(ctx context.Context, module, sum string) (string, error) {
	cmd := exec.CommandContext(ctx, "go", "mod", "download", "-json", module)
	cmd.Dir = os.TempDir() // not as a requirement of this module
	cmd.Env = append(os.Environ(), "GOWORK=off", "GOFLAGS=-mod=mod")
	out, err := cmd.Output()
	var got struct{ Dir, Sum, Error string }
	if jsonErr := json.Unmarshal(out, &got); jsonErr != nil || err != nil || got.Error != "" {
		return "", fmt.Errorf("download %s: %v %s", module, err, got.Error)
	}
	if got.Sum != sum {
		return "", fmt.Errorf("%s: its hash is %s, not %s", module, got.Sum, sum)
	}
	return got.Dir, nil
}

// schemas writes a JSON schema for each kind, once, below a directory of the version. A key
// that the schema does not know is refused, as a strict API server does.
var schemas = sync.OnceValue(func() error {
	for version, sum := range kubernetes {
		dir := filepath.Join(work, version)
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		if err := errors.Join(writeKubernetes(context.Background(), dir, version, sum), writeOperator(context.Background(), dir)); err != nil {
			return err
		}
	}
	return nil
})

func writeKubernetes(ctx context.Context, dir, version, sum string) error {
	kube, err := moduleDir(ctx, "k8s.io/kubernetes@v"+version, sum)
	if err != nil {
		return err
	}
	var api struct{ Definitions map[string]map[string]any }
	text, err := os.ReadFile(filepath.Join(kube, "api/openapi-spec/swagger.json"))
	if err == nil {
		err = json.Unmarshal(text, &api)
	}
	if err != nil {
		return err
	}
	for name, def := range api.Definitions {
		kinds, _ := def["x-kubernetes-group-version-kind"].([]any)
		for _, k := range kinds {
			k := k.(map[string]any)
			reached := make(map[string]any)
			reach(api.Definitions, name, reached)
			s := map[string]any{"$ref": "#/definitions/" + name, "definitions": reached}
			if err := writeSchema(dir, fmt.Sprint(k["kind"]), fmt.Sprint(k["group"]), fmt.Sprint(k["version"]), s); err != nil {
				return err
			}
		}
	}
	return nil
}

func writeOperator(ctx context.Context, dir string) error {
	module, err := moduleDir(ctx, operator.module, operator.sum)
	if err != nil {
		return err
	}
	for _, kind := range []string{"PodMonitor", "ServiceMonitor", "PrometheusRule"} {
		var crd struct {
			Spec struct {
				Group    string
				Versions []struct {
					Name   string
					Schema struct{ OpenAPIV3Schema any }
				}
			}
		}
		text, err := os.ReadFile(filepath.Join(module, "example/prometheus-operator-crd", "monitoring.coreos.com_"+strings.ToLower(kind)+"s.yaml"))
		if err == nil {
			err = yaml.Unmarshal(text, &crd)
		}
		if err != nil {
			return err
		}
		for _, v := range crd.Spec.Versions {
			s := strict(v.Schema.OpenAPIV3Schema).(map[string]any)
			if err := writeSchema(dir, kind, crd.Spec.Group, v.Name, s); err != nil {
				return err
			}
		}
	}
	return nil
}

// writeSchema names the file as kubeconform looks for it.
func writeSchema(dir, kind, group, version string, schema map[string]any) error {
	text, err := json.Marshal(schema)
	if err != nil {
		return err
	}
	suffix := version
	if group != "" {
		suffix, _, _ = strings.Cut(group, ".")
		suffix += "-" + version
	}
	return os.WriteFile(filepath.Join(dir, strings.ToLower(kind+"-"+suffix)+".json"), text, 0o644)
}

// reach adds a definition, and all that it refers to, to reached.
func reach(all map[string]map[string]any, name string, reached map[string]any) {
	if reached[name] != nil {
		return
	}
	switch name {
	case "io.k8s.apimachinery.pkg.api.resource.Quantity", "io.k8s.apimachinery.pkg.util.intstr.IntOrString":
		// The wire form of both is either; the OpenAPI file says string.
		reached[name] = map[string]any{"type": []string{"string", "number"}}
		return
	}
	def := strict(map[string]any(all[name])).(map[string]any)
	reached[name] = def
	var walk func(any)
	walk = func(v any) {
		switch v := v.(type) {
		case map[string]any:
			if ref, ok := v["$ref"].(string); ok {
				reach(all, strings.TrimPrefix(ref, "#/definitions/"), reached)
			}
			for _, part := range v {
				walk(part)
			}
		case []any:
			for _, part := range v {
				walk(part)
			}
		}
	}
	walk(def)
}

// strict is a copy of a schema that allows no other keys than it names.
func strict(schema any) any {
	switch schema := schema.(type) {
	case map[string]any:
		c := maps.Clone(schema)
		for key, part := range schema {
			c[key] = strict(part)
		}
		_, isSchema := schema["properties"].(map[string]any)
		if _, open := schema["additionalProperties"]; isSchema && !open && schema["x-kubernetes-preserve-unknown-fields"] != true {
			c["additionalProperties"] = false
		}
		if schema["x-kubernetes-int-or-string"] == true {
			delete(c, "type")
		}
		return c
	case []any:
		c := make([]any, len(schema))
		for i, part := range schema {
			c[i] = strict(part)
		}
		return c
	}
	return schema
}

// conform checks manifests with kubeconform.
func conform(t *testing.T, version, manifests string) (report string, ok bool) {
	t.Helper()
	if err := schemas(); err != nil {
		t.Fatal(err)
	}
	stdout, stderr, ok := tool(t, "kubeconform", []byte(manifests), "-strict", "-summary", "-verbose", "-schema-location", filepath.Join(work, version)+"/{{ .ResourceKind }}{{ .KindSuffix }}.json", "-")
	return stdout + stderr, ok
}

// emptied takes away what has a default and may be empty.
const emptied = "priorityClassName=,tolerations=null,nodeSelector=null,resources.requests=null,seLinuxOptions=null,updateStrategy.rollingUpdate=null"

// Every manifest is what Kubernetes takes, the newest and the oldest.
func TestManifestsConform(t *testing.T) {
	t.Parallel()
	for _, set := range sets {
		for _, more := range []string{"startupTaint.enabled=false", "startupTaint.enabled=true", emptied} {
			rendered := template(t, set, "--set", more)
			want := fmt.Sprintf("Valid: %d, Invalid: 0, Errors: 0, Skipped: 0", len(objects(t, rendered)))
			for version := range kubernetes {
				if report, ok := conform(t, version, rendered); !ok || !strings.Contains(report, want) {
					t.Errorf("%s, Kubernetes %s: want %s\n%s", set, version, want, report)
				}
			}
		}
	}
}

// The check finds what it is for.
func TestConformityCheckRefuses(t *testing.T) {
	t.Parallel()
	rendered := template(t, "everything")
	for _, c := range []struct{ from, to, want string }{
		{"hostNetwork: true", "hostNetwrk: true", "'hostNetwrk'"},
		{"terminationGracePeriodSeconds: 10", "terminationGracePeriodSeconds: soon", "terminationGracePeriodSeconds"},
		{"path: /readyz}", "paht: /readyz}", "'paht'"},
		{"interval: 30s", "interval: often", "interval"},
		{"- alert: ", "- alarm: ", "'alarm'"},
		{"\nkind: Service\n", "\nkind: Sevrice\n", "could not find schema"},
	} {
		broken := strings.Replace(rendered, c.from, c.to, 1)
		if broken == rendered {
			t.Fatalf("no %q in the rendering", c.from)
		}
		if report, ok := conform(t, kubeVersion, broken); ok || !strings.Contains(report, c.want) {
			t.Errorf("%s: accepted %v, want %s in\n%s", c.to, ok, c.want, report)
		}
	}
}
