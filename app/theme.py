"""How the page looks: system fonts (nothing is fetched from outside), light and dark, from a phone to a wide screen."""
import gradio as gr

__all__ = ['CSS', 'theme']

_SANS = ('system-ui', '-apple-system', 'Segoe UI', 'Roboto', 'Helvetica Neue', 'Arial', 'sans-serif')
_MONO = ('ui-monospace', 'SFMono-Regular', 'Menlo', 'Consolas', 'monospace')


def theme() -> gr.themes.Base:
    """The Gradio theme; colours come in a light and a dark variant by themselves."""
    return gr.themes.Default(
        primary_hue=gr.themes.colors.teal,
        secondary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=_SANS,
        font_mono=_MONO,
    ).set(
        body_background_fill='*neutral_50',
        body_background_fill_dark='*neutral_950',
        button_primary_background_fill='*primary_700',
        button_primary_background_fill_hover='*primary_600',
        button_primary_background_fill_dark='*primary_700',
        button_primary_background_fill_hover_dark='*primary_600',
        button_primary_text_color='white',
        button_primary_text_color_dark='white',
        color_accent='*primary_600',
        body_text_color_subdued='*neutral_600',
        body_text_color_subdued_dark='*neutral_400',
        link_text_color='*primary_700',
        link_text_color_dark='*primary_300',
    )


# Colours only through Gradio's variables, so that dark mode needs no second set.
CSS = """
body { background: var(--body-background-fill) !important; }
.gradio-container { max-width: 1120px !important; width: 100% !important; min-width: 0 !important;
    margin: 0 auto !important; }
.gradio-container .main { padding: 16px clamp(12px, 3vw, 32px) !important; }
.gradio-container .html-container { padding: 0; }
#vh-header { padding: 8px 0 0; }
#vh-header h1 { font-size: clamp(1.4rem, 4vw, 1.7rem); line-height: 1.2; margin: 0; letter-spacing: -0.02em; }
#vh-header p, #vh-footer { color: var(--body-text-color-subdued); margin: 4px 0 0; }
#vh-footer { font-size: var(--text-sm); padding: 8px 0; }
.vh-note { color: var(--body-text-color-subdued); font-size: var(--text-sm); line-height: 1.5; }
#vh-examples .grid-wrap, .vh-thumbnails .grid-wrap { padding-top: 30px; height: auto; min-height: 0; max-height: none; }
#vh-examples .grid-container, .vh-thumbnails .grid-container { grid-template-columns: repeat(3, minmax(0, 1fr)); }
.vh-note b { color: var(--body-text-color); font-weight: 600; }

.vh-status { border-radius: var(--radius-md); padding: 10px 14px; border: 1px solid var(--border-color-primary);
    background: var(--block-background-fill); overflow-wrap: anywhere; line-height: 1.45; }
.vh-status.vh-error { border-color: var(--error-border-color); border-left-width: 5px; font-weight: 500; }
.vh-status progress { display: block; width: 100%; height: 6px; margin-top: 8px; accent-color: var(--color-accent); }

.vh-facts { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 8px; margin: 0; }
.vh-facts div:first-child { grid-column: 1 / -1; }
.vh-facts div { border: 1px solid var(--border-color-primary); border-radius: var(--radius-md); padding: 8px 12px;
    background: var(--block-background-fill); min-width: 0; }
.vh-facts dt { color: var(--body-text-color-subdued); font-size: var(--text-sm); }
.vh-facts dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }

.vh-families { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 12px; }
.vh-family { border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg); padding: 14px 16px;
    background: var(--block-background-fill); min-width: 0; display: flex; flex-direction: column; gap: 6px; }
.vh-family h3 { margin: 0; font-size: 1.05rem; display: flex; gap: 8px; align-items: baseline; flex-wrap: wrap; }
.vh-family p { margin: 0; line-height: 1.45; overflow-wrap: anywhere; }
.vh-family a { margin: 0; padding: 0; color: var(--link-text-color); text-decoration: underline; }
.vh-family table { border: 0; width: 100%; border-collapse: collapse; font-size: var(--text-sm); }
.vh-family tr { border: 0; }
.vh-family th, .vh-family td { text-align: left; padding: 4px 8px 4px 0; border: 0;
    border-bottom: 1px solid var(--border-color-primary); overflow-wrap: anywhere; }
.vh-family th { font-weight: 500; color: var(--body-text-color-subdued); }
.vh-family .vh-number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.vh-family tr > :last-child { padding-right: 0; }
.vh-task { font-size: var(--text-xs); font-weight: 500; border-radius: 999px; padding: 1px 9px;
    border: 1px solid var(--border-color-primary); color: var(--body-text-color-subdued); }

.vh-steps { display: flex; flex-direction: column; gap: 8px; }
.vh-steps figure { margin: 0; }
.vh-steps figure[hidden] { display: none; }
.vh-steps img { display: block; width: 100%; max-width: 480px; height: auto; margin: 0 auto;
    border-radius: var(--radius-md); image-rendering: pixelated; }
.vh-steps figcaption { text-align: center; font-weight: 600; padding-top: 8px; font-variant-numeric: tabular-nums; }
.vh-steps input[type=range] { width: 100%; height: 28px; margin: 0; accent-color: var(--color-accent);
    cursor: pointer; }
.vh-ends { display: flex; justify-content: space-between; font-size: var(--text-sm); margin-top: -6px;
    color: var(--body-text-color-subdued); }
.vh-legend { list-style: none; margin: 4px 0 0; padding: 0; display: grid; gap: 4px; }
.vh-legend li { display: flex; gap: 8px; align-items: center; margin: 0; }
.vh-legend i { flex: none; width: 26px; height: 18px; border-radius: 3px;
    border: 1px solid var(--border-color-primary); }
.vh-legend .vh-alone { background: linear-gradient(135deg, #d9a066, #8f563b 45%, #5b6ee1); }
.vh-legend .vh-merged { background: #a07850; border: 2px solid white; outline: 1px solid #7f8794; }
.vh-legend .vh-gone { background: repeating-linear-gradient(135deg, #70808f 0 1px, #1c1c22 1px 5px); }

.vh-planes { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 190px), 1fr)); gap: 12px; }
.vh-plane figure { margin: 0; }
.vh-plane figure[hidden] { display: none; }
.vh-plane figure div { position: relative; background: black; border-radius: var(--radius-md); overflow: hidden;
    aspect-ratio: 1; display: grid; place-items: center; }
.vh-plane img { grid-area: 1 / 1; display: block; width: 100%; height: 100%; object-fit: contain; }
.vh-plane .vh-mask { opacity: var(--vh-mask, 0.5); image-rendering: pixelated; }
.vh-plane figcaption { text-align: center; font-size: var(--text-sm); font-variant-numeric: tabular-nums; }
.vh-volume input[type=range] { width: 100%; height: 28px; margin: 0; accent-color: var(--color-accent);
    cursor: pointer; }
.vh-volume label { display: flex; gap: 10px; align-items: center; max-width: 280px; margin-top: 4px; }
.vh-volumes i { display: inline-block; width: 14px; height: 14px; border-radius: 3px; margin-right: 8px;
    vertical-align: -2px; }

.vh-empty { border: 1px dashed var(--border-color-primary); border-radius: var(--radius-md); padding: 32px 24px;
    text-align: center; }

.vh-table { width: 100%; border-collapse: collapse; border: 0; margin: 6px 0 8px; table-layout: fixed; }
.vh-table caption { text-align: left; font-weight: 600; padding-bottom: 2px; }
.vh-table tr { border: 0; }
.vh-table th, .vh-table td { border: 0; border-bottom: 1px solid var(--border-color-primary); padding: 5px 10px 5px 0;
    text-align: left; vertical-align: middle; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.vh-table tr > :last-child { padding-right: 0; }
.vh-table thead th { font-weight: 500; font-size: var(--text-sm); color: var(--body-text-color-subdued); }
.vh-table tbody th { font-weight: 500; }
.vh-classes td { font-size: var(--text-sm); }
.vh-bar { height: 8px; border-radius: 4px; background: var(--border-color-primary); overflow: hidden;
    margin-bottom: 2px; }
.vh-bar i { display: block; height: 100%; border-radius: 4px; background: var(--color-accent); }
.vh-bar.vh-full i { background: var(--body-text-color-subdued); }
"""
