package metrics_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"bauta.dev/bauta/internal/metrics"
	"bauta.dev/bauta/internal/policy"
)

const (
	alertsFile    = "../../charts/bauta/files/alerts.yaml"
	dashboardFile = "../../charts/bauta/files/dashboard.json"
)

func read(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// The page of the metrics is made of the table.
func TestPage(t *testing.T) {
	var b strings.Builder
	b.WriteString(`# Metrics

Generated from the table in ` + "`internal/metrics`" + `: ` + "`go test ./internal/metrics -update`" + ` writes this page.

` + "`prometheus-serve-addr`" + ` (` + "`:9965`, `127.0.0.1:9965`, `[::1]:9965`" + `) serves ` + "`/metrics`, `/healthz` and `/readyz`" + `;
[operations](operations.md#metrics-and-health-checks) says what the last two mean. A scrape walks no flow table: it costs the same with any number of flows.

*kernel*: the counter lives in the kernel and goes on when the agent restarts; it begins anew after ` + "`bauta cleanup`" + `, a reboot, or
a migration to a new layout of the tables. *agent*: it begins anew with the agent. What counts flows by family and protocol, and the port use, comes from
the walk that expires flows, every 5 seconds (with a million flows, every half a minute): counters in the programs would
cost each new flow, and reading them at a scrape would cost a walk. Each metric has an example of an alert or a query;
[alerts.yaml](../charts/bauta/files/alerts.yaml) is a set of rules to begin with, and
[dashboard.json](../charts/bauta/files/dashboard.json) a dashboard for Grafana. ` + "`process_*`" + ` (CPU, memory and
descriptors of the agent) are as everywhere.
`)
	for _, where := range []metrics.Where{metrics.Anywhere, metrics.BPFOnly, metrics.IPTablesOnly} {
		fmt.Fprintf(&b, "\n## In %s\n", where)
		for _, m := range metrics.Table() {
			if m.Where != where {
				continue
			}
			name := m.FullName()
			if len(m.Labels) > 0 {
				name += "{" + strings.Join(m.Labels, ",") + "}"
			}
			text := strings.ToUpper(m.Help[:1]) + m.Help[1:] + "."
			if m.Note != "" {
				text += " " + m.Note
			}
			fmt.Fprintf(&b, "\n`%s`: %s", name, m.Kind)
			if m.Kind != metrics.Gauge {
				fmt.Fprintf(&b, ", %s", m.Lives)
			}
			fmt.Fprintf(&b, ". %s\n\n    %s\n", text, m.Example)
		}
	}
	golden(t, "../../docs/metrics.md", b.String())
}

var (
	metricName = regexp.MustCompile(`\b(bauta|process)_[a-z_]+`)
	reasonName = regexp.MustCompile(`\b(pass|masq|hold|drop)-[a-z-]+`)
	labelPair  = regexp.MustCompile(`\b([a-z_]+)\s*(?:=~|=|!=|!~)\s*"`)
)

// checkNames finds metrics, labels and reasons that there are not.
func checkNames(t *testing.T, where, expr string) {
	t.Helper()
	kinds := make(map[string]metrics.Kind)
	labels := []string{"job", "instance"}
	for _, m := range metrics.Table() {
		kinds[m.FullName()] = m.Kind
		labels = append(labels, m.Labels...)
	}
	for _, name := range metricName.FindAllString(expr, -1) {
		if strings.HasPrefix(name, "process_") {
			if !strings.Contains(string(read(t, "testdata/process.txt")), name+"\n") {
				t.Errorf("%s: no metric %s", where, name)
			}
			continue
		}
		kind, ok := kinds[name]
		for _, suffix := range []string{"_bucket", "_sum", "_count"} {
			if base, cut := strings.CutSuffix(name, suffix); cut && !ok {
				kind = kinds[base]
				ok = kind == metrics.Histogram
			}
		}
		if !ok {
			t.Errorf("%s: no metric %s", where, name)
		}
		if i := strings.Index(expr, name); kind == metrics.Counter && !regexp.MustCompile(`(rate|increase|changes)\($`).MatchString(expr[:i]) {
			t.Errorf("%s: counter %s without a rate", where, name)
		}
	}
	for _, reason := range reasonName.FindAllString(expr, -1) {
		if reason != "masq-" && !slices.ContainsFunc(policy.Outcomes(), func(o policy.OutcomeInfo) bool { return o.Name == reason }) {
			t.Errorf("%s: no reason %s", where, reason)
		}
	}
	for _, m := range labelPair.FindAllStringSubmatch(expr, -1) {
		if !slices.Contains(labels, m[1]) {
			t.Errorf("%s: no label %s", where, m[1])
		}
	}
}

// checkExpressions has promtool parse expressions.
func checkExpressions(t *testing.T, expressions map[string]string) {
	t.Helper()
	type rule struct {
		Record string `json:"record"`
		Expr   string `json:"expr"`
	}
	var rules []rule
	for _, expr := range expressions {
		rules = append(rules, rule{fmt.Sprintf("r%d", len(rules)), expr})
	}
	data, err := yaml.Marshal(map[string]any{"groups": []any{map[string]any{"name": "a", "rules": rules}}})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "rules.yaml")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	promtool(t, "", "check", "rules", path)
}

func TestExamples(t *testing.T) {
	all := make(map[string]string)
	for _, m := range metrics.Table() {
		all[m.Name] = m.Example
		checkNames(t, m.Name, m.Example)
		if !strings.Contains(m.Example, m.FullName()) {
			t.Errorf("%s: the example is of something else: %s", m.Name, m.Example)
		}
	}
	checkExpressions(t, all)
}

func TestAlerts(t *testing.T) {
	promtool(t, "", "check", "rules", alertsFile)
	promtool(t, "", "test", "rules", "testdata/alerts_test.yaml")
	var file struct {
		Groups []struct {
			Rules []struct {
				Alert, Expr         string
				Labels, Annotations map[string]string
			}
		}
	}
	if err := yaml.Unmarshal(read(t, alertsFile), &file); err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, g := range file.Groups {
		for _, r := range g.Rules {
			n++
			checkNames(t, r.Alert, r.Expr)
			if !metricName.MatchString(r.Expr) || r.Labels["severity"] == "" || r.Annotations["summary"] == "" || r.Annotations["description"] == "" {
				t.Errorf("%s: an alert has a metric of ours, a severity, a summary and a description", r.Alert)
			}
		}
	}
	if n < 10 {
		t.Errorf("%d alerts found", n)
	}
}

func TestDashboard(t *testing.T) {
	var board struct {
		Panels []struct {
			ID      int
			Title   string
			Targets []struct{ Expr string }
		}
		Templating struct {
			List []struct {
				Name  string
				Query any
			}
		}
	}
	if err := json.Unmarshal(read(t, dashboardFile), &board); err != nil {
		t.Fatal(err)
	}
	for _, v := range board.Templating.List {
		checkNames(t, "variable "+v.Name, fmt.Sprint(v.Query))
	}
	shown := make(map[string]bool)
	seen := make(map[int]bool)
	all := make(map[string]string)
	for _, p := range board.Panels {
		if seen[p.ID] || p.Title == "" || len(p.Targets) == 0 {
			t.Errorf("panel %d %q: an id of its own, a title, a query", p.ID, p.Title)
		}
		seen[p.ID] = true
		for i, target := range p.Targets {
			checkNames(t, p.Title, target.Expr)
			for _, name := range metricName.FindAllString(target.Expr, -1) {
				shown[strings.TrimSuffix(name, "_bucket")] = true
			}
			all[fmt.Sprint(p.Title, i)] = strings.NewReplacer("$__rate_interval", "5m", "$instance", ".*").Replace(target.Expr)
		}
	}
	checkExpressions(t, all)
	// What needs no look at a time line is left out.
	for _, m := range metrics.Table() {
		if !shown[m.FullName()] && !slices.Contains([]string{"config_last_success_timestamp_seconds", "masquerade_address_info",
			"nat_flows_limit", "events_lost_total", "pod_refused_total"}, m.Name) {
			t.Errorf("%s: no panel shows it", m.FullName())
		}
	}
}
