package chart_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// schema is what the tests look at of values.schema.json.
type schema struct {
	Description          string
	Type                 any // one, or a list
	Enum                 []any
	Properties           ordered
	AdditionalProperties any
	AllOf                []struct {
		Ref string `json:"$ref"`
	}
	Definitions map[string]*schema
	Items       *schema
}

// ordered are properties in the order of the file.
type ordered []property

type property struct {
	name string
	*schema
}

func (o *ordered) UnmarshalJSON(text []byte) error {
	d := json.NewDecoder(bytes.NewReader(text))
	if _, err := d.Token(); err != nil {
		return err
	}
	for d.More() {
		name, err := d.Token()
		if err != nil {
			return err
		}
		var raw json.RawMessage
		if err := d.Decode(&raw); err != nil {
			return err
		}
		if string(raw) == "false" {
			continue // refused
		}
		p := property{fmt.Sprint(name), new(schema)}
		if err := json.Unmarshal(raw, p.schema); err != nil {
			return err
		}
		*o = append(*o, p)
	}
	return nil
}

func readSchema(t *testing.T) *schema {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(chartDir, "values.schema.json"))
	s := new(schema)
	if err == nil {
		err = json.Unmarshal(text, s)
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func readValues(t *testing.T) (values map[string]any, lines int) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(chartDir, "values.yaml"))
	if err == nil {
		err = yaml.UnmarshalStrict(text, &values)
	}
	if err != nil {
		t.Fatal(err)
	}
	return values, strings.Count(string(text), "\n")
}

// shape is what may be written, in words.
func (s *schema) shape(definitions map[string]*schema) string {
	if len(s.AllOf) == 1 {
		return definitions[strings.TrimPrefix(s.AllOf[0].Ref, "#/definitions/")].shape(definitions)
	}
	if len(s.Enum) > 0 {
		var texts []string
		for _, v := range s.Enum {
			if v != "" {
				texts = append(texts, fmt.Sprintf("`%v`", v))
			}
		}
		return strings.Join(texts, ", ")
	}
	var types []string
	switch of := s.Type.(type) {
	case string:
		types = []string{of}
	case []any:
		for _, v := range of {
			types = append(types, fmt.Sprint(v))
		}
	}
	words := map[string]string{"boolean": "true or false", "string": "text", "integer": "number", "array": "list", "object": "map"}
	var texts []string
	for _, typ := range types {
		if typ != "null" {
			texts = append(texts, words[typ])
		}
	}
	return strings.Join(texts, " or ")
}

// asInAPod are values whose inner form is Kubernetes' own, and extraConfig's the agent's.
var asInAPod = []string{"resources", "seLinuxOptions", "imagePullSecrets", "extraConfig"}

// walk visits every value of the schema, and then those below it.
func (s *schema) walk(prefix string, values any, visit func(path string, p property, def any)) {
	of, _ := values.(map[string]any)
	for _, p := range s.Properties {
		visit(prefix+p.name, p, of[p.name])
		if !slices.Contains(asInAPod, p.name) {
			p.walk(prefix+p.name+".", of[p.name], visit)
		}
	}
}

// The page is generated, so that it says what the schema says:
// go test ./test/chart -run ValuesPage -update
func TestValuesPage(t *testing.T) {
	t.Parallel()
	var b strings.Builder
	b.WriteString(`# Values of the chart

Generated from ` + "`charts/bauta/values.schema.json` and `values.yaml`" + `. How to use them: [kubernetes.md](kubernetes.md).

Names, form and meaning are Cilium's where Cilium has the value. A value that is empty is not written into the agent's
configuration: the agent's default holds ([options.md](options.md)), or what the ConfigMap of
` + "`existingConfigDirConfigMap`" + ` says. A name that is not here is refused. A *text or list* is written as
` + "`eth0 eth1`, `eth0,eth1` or `[eth0, eth1]`" + `.

| Value | Form | Default | What |
|---|---|---|---|
`)
	s := readSchema(t)
	values, _ := readValues(t)
	s.walk("", values, func(path string, p property, def any) {
		cell := ""
		if len(p.Properties) > 0 && !slices.Contains(asInAPod, p.name) {
			def = nil // the rows below have it
		}
		if text, err := json.Marshal(def); err == nil && def != nil && def != "" && string(text) != "[]" && string(text) != "{}" {
			cell = "`" + strings.Trim(string(text), `"`) + "`"
		}
		what := p.Description
		if p.name == "extraConfig" {
			var names []string
			for _, o := range p.Properties {
				names = append(names, "`"+o.name+"`")
			}
			what += ": " + strings.Join(names, ", ")
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", path, p.shape(s.Definitions), cell, strings.ReplaceAll(what, "|", `\|`))
	})
	golden(t, "../../docs/values.md", b.String())
}

// Every value is described, allows nothing unknown below it, and is there once.
func TestSchemaIsComplete(t *testing.T) {
	t.Parallel()
	s := readSchema(t)
	if s.AdditionalProperties != false {
		t.Error("unknown values are accepted")
	}
	var inner func(path string, s *schema)
	inner = func(path string, s *schema) {
		for _, p := range s.Properties {
			path := path + p.name
			if p.Description == "" && !strings.HasPrefix(path, "extraConfig.") {
				t.Errorf("%s: no description", path)
			}
			if p.Type == nil && p.Enum == nil && len(p.AllOf) == 0 && !strings.HasPrefix(path, "extraConfig.") {
				t.Errorf("%s: anything is accepted", path)
			}
			if len(p.Properties) > 0 && p.AdditionalProperties == nil {
				t.Errorf("%s: unknown values are accepted", path)
			}
			inner(path+".", p.schema)
		}
	}
	inner("", s)

	values, lines := readValues(t)
	if lines > 55 {
		t.Errorf("values.yaml: %d lines: it is for what most people look at, docs/values.md has the rest", lines)
	}
	var known []string
	s.walk("", values, func(path string, _ property, _ any) { known = append(known, path) })
	var missing func(prefix string, v map[string]any)
	missing = func(prefix string, v map[string]any) {
		for name, below := range v {
			path := prefix + name
			if !slices.Contains(known, path) {
				t.Errorf("%s: in values.yaml, but not in the schema", path)
			}
			if m, ok := below.(map[string]any); ok && slices.ContainsFunc(known, func(k string) bool { return strings.HasPrefix(k, path+".") }) {
				missing(path+".", m)
			}
		}
	}
	missing("", values)
}
