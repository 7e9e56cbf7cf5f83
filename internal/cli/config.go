package cli

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"bauta.dev/bauta/internal/advice"
	"bauta.dev/bauta/internal/config"
	"bauta.dev/bauta/internal/ipmasq"
)

func (a *app) newConfig() *cobra.Command {
	return group("config", "Check configuration files", "Check configuration files.", a.newValidate())
}

// verdict is what config validate says about one file, or about the effective
// configuration.
type verdict struct {
	Subject  string          `json:"subject"`
	Kind     fileKind        `json:"kind"`
	Valid    bool            `json:"valid"`
	Error    string          `json:"error,omitempty"`
	Hints    []string        `json:"hints,omitempty"`
	Policy   *effective      `json:"policy,omitempty"`   // of an agent configuration
	Profiles []profileResult `json:"profiles,omitempty"` // of an ip-masq-agent file

	err error
}

// profileResult is an ip-masq-agent file by the rules of one profile.
type profileResult struct {
	Profile ipmasq.Profile `json:"profile"`
	Valid   bool           `json:"valid"`
	Error   string         `json:"error,omitempty"`
	List    *ipmasq.List   `json:"list,omitempty"`
}

func (a *app) newValidate() *cobra.Command {
	var f *format
	var src sourceFlags
	profile := string(ipmasq.Cilium)
	c := &cobra.Command{
		Use:   "validate [FILE]...",
		Short: "Check files, and print the policy they mean",
		Long: `Check files, and print the policy they mean. Whether a FILE is an agent
configuration or an ip-masq-agent file shows in its keys; a directory of either
will do too. Without FILE it checks the effective configuration: the environment,
--config and --config-dir, as the agent would read them.

An ip-masq-agent file is shown by the rules of every profile; --profile says which
one has to accept it. The exit status is 1 if anything is refused.`,
		Example: `  bauta config validate /etc/bauta/config.yaml
  bauta config validate /etc/config/ip-masq-agent --profile strict
  BAUTA_POD_CIDRS=10.0.0.0/16 bauta config validate`,
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) > 0 && src != (sourceFlags{}) {
				return &usageError{msg: c.CommandPath() + ": FILE and --config or --config-dir", hints: []string{"give either: a FILE is checked by itself"}}
			}
			var verdicts []verdict
			for _, path := range args {
				verdicts = append(verdicts, judgeFile(path, ipmasq.Profile(profile)))
			}
			if len(args) == 0 {
				verdicts = append(verdicts, judgeConfig("effective configuration", config.Sources{Environ: a.Environ, File: src.file, Dir: src.dir}))
			}
			return a.showVerdicts(*f, verdicts)
		},
	}
	src.register(c)
	c.Flags().Var(&enumValue{&profile, profileNames()}, "profile", "`profile` that has to accept ip-masq-agent files: "+strings.Join(profileNames(), ", "))
	_ = c.RegisterFlagCompletionFunc("profile", cobra.FixedCompletions(profileNames(), cobra.ShellCompDirectiveNoFileComp))
	f = outputFlag(c)
	return c
}

func profileNames() []string {
	var names []string
	for _, p := range ipmasq.Profiles() {
		names = append(names, string(p))
	}
	return names
}

// showVerdicts prints what is valid, then reports what is not.
func (a *app) showVerdicts(f format, verdicts []verdict) error {
	var texts []string
	bad := false
	for _, v := range verdicts {
		if v.Valid || len(v.Profiles) > 0 {
			texts = append(texts, v.text())
		}
		bad = bad || !v.Valid
	}
	if err := a.show(f, verdicts, func() string { return strings.Join(texts, "\n") }); err != nil {
		return err
	}
	for _, v := range verdicts {
		report(a.Stderr, v.err)
	}
	if bad {
		return errReported
	}
	return nil
}

func (v verdict) refuse(err error) verdict {
	if !strings.Contains(err.Error(), v.Subject) && v.Kind != kindEffective {
		err = fmt.Errorf("%s: %w", v.Subject, err)
	}
	v.Error, v.Hints, v.err = oneLine(err.Error()), hints(err), err
	return v
}

func judgeFile(path string, profile ipmasq.Profile) verdict {
	kind, err := detect(path)
	v := verdict{Subject: path, Kind: kind}
	switch {
	case err != nil:
		return v.refuse(err)
	case kind == kindIPMasq:
		return judgeIPMasq(v, profile)
	case kind == kindAgentDir:
		return judgeConfig(path, config.Sources{Dir: path})
	}
	return judgeConfig(path, config.Sources{File: path})
}

func judgeIPMasq(v verdict, profile ipmasq.Profile) verdict {
	var refused error
	for _, p := range ipmasq.Profiles() {
		r := profileResult{Profile: p}
		list, err := ipmasq.Load(v.Subject, p)
		if err != nil {
			r.Error = oneLine(err.Error())
		} else {
			r.Valid, r.List = true, &list
		}
		if p == profile {
			refused = err
		}
		v.Profiles = append(v.Profiles, r)
	}
	v.Valid = refused == nil
	if refused != nil {
		return v.refuse(advice.New(refused, "the agent would keep its last good list; at its first start it would use the defaults"))
	}
	return v
}

func judgeConfig(subject string, src config.Sources) verdict {
	v := verdict{Subject: subject, Kind: kindAgent}
	switch {
	case src.Dir != "" && src.File == "" && src.Environ == nil:
		v.Kind = kindAgentDir
	case src.Environ != nil || src.File == "":
		v.Kind = kindEffective
	}
	cfg, err := config.Load(src)
	if err != nil {
		return v.refuse(err)
	}
	v.Policy, err = effectivePolicy(cfg)
	if err != nil {
		return v.refuse(err)
	}
	v.Valid = true
	return v
}

// enumValue is a flag with few values.
type enumValue struct {
	value  *string
	values []string
}

func (v *enumValue) String() string { return *v.value }
func (v *enumValue) Type() string   { return "string" }

func (v *enumValue) Set(s string) error {
	for _, one := range v.values {
		if strings.EqualFold(one, s) {
			*v.value = one
			return nil
		}
	}
	return fmt.Errorf("%q: not one of %s", s, strings.Join(v.values, ", "))
}
