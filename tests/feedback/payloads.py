"""Sixty texts that would run, fetch or change something in a page that does not escape them.

Each calls `ran(...)`, fetches a path that begins with /stolen, carries the attribute data-injected,
or is a template whose value is 7 * 191 = 1337. `CLEAN` says what a page must not contain.
"""

IMG = '<img data-injected src=/stolen onerror=ran()>'

# Elements: in the text of a page they add an element with the attribute data-injected.
ELEMENTS = (
  '<script data-injected>ran()</script>',
  '<ScRiPt data-injected>ran()</sCrIpT >',
  '<script data-injected src=/stolen.js></script>',
  '<script data-injected src="data:text/javascript,ran()"></script>',
  '<scr<script data-injected>ran()</script>ipt>',
  '<script data-injected type=module>import "/stolen.js"</script>',
  IMG,
  '<img data-injected src="x" onerror="alert(1)">',
  '<img/data-injected/src=/stolen/onerror=ran()>',
  '<img data-injected srcset="/stolen 2x, /stolen.png 1x">',
  '<svg data-injected onload=ran()></svg>',
  '<svg data-injected><script>ran()</script></svg>',
  '<svg data-injected><animate onbegin=ran() attributeName=x dur=1s></svg>',
  '<svg data-injected><a xlink:href="javascript:ran()"><text y=20>link</text></a></svg>',
  '<svg data-injected><use href="/stolen.svg#x"></use></svg>',
  '<math data-injected><mtext><img src=x onerror=ran()></mtext></math>',
  '<iframe data-injected src="javascript:parent.ran()"></iframe>',
  '<iframe data-injected srcdoc="<script>parent.ran()</script>"></iframe>',
  '<object data-injected data="/stolen.html"></object>',
  '<embed data-injected src="/stolen.html">',
  '<video data-injected autoplay><source onerror=ran() src=/stolen.mp4></video>',
  '<audio data-injected src=/stolen.ogg onerror=ran()></audio>',
  '<details data-injected open ontoggle=ran()>more</details>',
  '<input data-injected autofocus onfocus=ran()>',
  '<a data-injected href="javascript:ran()">a link</a>',
  '<a data-injected href="jav&#x09;ascript:ran()">a link</a>',
  '<form data-injected action="/stolen"><button>Send</button></form>',
  '<button data-injected formaction="javascript:ran()">Judge</button>',
  '<link data-injected rel=stylesheet href=/stolen.css>',
  '<style data-injected>@import "/stolen.css"; * { background: url(/stolen.png) }</style>',
  '<div data-injected style="background: url(/stolen.png); position: fixed; inset: 0">x</div>',
  '<base data-injected href="https://stolen.example/">',
  '<meta data-injected http-equiv=refresh content="0;url=/stolen">',
  '<marquee data-injected onstart=ran()>x</marquee>',
  '<div data-injected hx-get="/stolen" hx-trigger="load">x</div>',
  '<div data-injected data-hx-post="/stolen" data-hx-trigger="load">x</div>',
  '<div data-injected hx-on:click="ran()" hx-on::load="ran()">x</div>',
  '<div data-injected hx-trigger="load[ran()]" hx-get="/stolen">x</div>',
  '<div data-injected hx-vals="js:{x: ran()}" hx-post="/stolen" hx-trigger="load">x</div>',
  '<div data-injected id=main hx-swap-oob="true">replaced</div>',
  '<template data-injected shadowrootmode=open><img src=/stolen></template>',
)
# Ends of the element, comment or script around the text.
CLOSING = (
  f'</textarea>{IMG}',
  f'</title>{IMG}',
  f'</style>{IMG}',
  f'</script>{IMG}',
  f'</pre></p></div></main>{IMG}',
  f'-->{IMG}<!--',
  f']]>{IMG}<![CDATA[',
)
# Ends of the attribute around the text.
ATTRIBUTES = (
  '" data-injected onmouseover="ran()',
  "' data-injected onmouseover='ran()",
  '"><img data-injected src=/stolen onerror=ran()>',
  '" data-injected autofocus onfocus="ran()" x="',
)
# Templates: they would show 1337.
TEMPLATES = ('{{ 7*191 }}', '{% print(7*191) %}', '${7*191}')
# Texts that become markup if something decodes or normalises them.
ENCODED = (
  '&lt;img data-injected src=/stolen onerror=ran()&gt;',
  '\uff1cscript data-injected\uff1eran()\uff1c/script\uff1e',  # fullwidth brackets: NFKC makes <>
  '%3Cimg data-injected src=/stolen onerror=ran()%3E',
  '\\u003cimg data-injected src=/stolen onerror=ran()\\u003e',
  'javascript:ran()//\u2028ran()\u202e gnp.exe\u202c',
)
ALL = ELEMENTS + CLOSING + ATTRIBUTES + TEMPLATES + ENCODED

# Installed before any script of a page: counts what ran and what the security policy blocked.
WATCH = """
window.runs = 0;
window.ran = () => { window.runs += 1; };
window.alert = window.ran;
window.blocked = [];
document.addEventListener('securitypolicyviolation', event => {
  window.blocked.push(`${event.violatedDirective} ${event.blockedURI} ${event.sample}`);
});
"""

# Returns what is wrong with a page: elements and attributes that only injected markup has.
CLEAN = """page => {
  const found = [];
  page = page || document;
  if (window.runs) found.push(`${window.runs} scripts ran`);
  for (const entry of window.blocked || []) found.push(`blocked: ${entry}`);
  for (const element of page.querySelectorAll('*')) {
    for (const {name, value} of element.attributes) {
      const bad = name === 'data-injected' || name.startsWith('on') || name === 'srcdoc'
        || name.includes('hx-on') || /^(data-)?hx-vals$/.test(name) && value.startsWith('js:')
        || /^(href|xlink:href|src|action|formaction|data)$/.test(name)
          && (/^\\s*(javascript|vbscript|data:text)/i.test(value) || value.startsWith('/stolen'));
      if (bad) found.push(`<${element.localName} ${name}="${value.slice(0, 60)}">`);
    }
  }
  if (page.body && page.body.textContent.includes('1337')) found.push('a template ran');
  return found;
}"""
